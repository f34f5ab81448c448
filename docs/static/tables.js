// Tells every cell the name of its column and whether it is blank: site.css shows the one and hides the other on phones.
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("table.docutils")) {
    const names = [...table.querySelectorAll("thead th")].map((cell) => cell.textContent.trim());
    for (const row of table.querySelectorAll("tbody tr")) {
      [...row.children].forEach((cell, place) => {
        if (names[place] && place > 0) cell.dataset.column = names[place];
        cell.classList.toggle("blank", !cell.textContent.trim());
      });
    }
  }
});
