// Tells every cell the name of its column and whether it is blank: on cards site.css shows the one and hides the other.
// Tables are cards on phones and from 16 columns on; from 9 they are set closer. Plans of several kinds may
// break after a +. No line of a command ends within a flag's name.
const PHONE = matchMedia("(max-width: 46em)");
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("table.docutils")) {
    const heads = [...table.querySelectorAll("thead th")];
    const names = heads.map((cell) => cell.textContent.trim());
    const wide = names.length > 8;
    const layOut = () => {
      const cards = PHONE.matches || names.length > 15;
      table.classList.toggle("cards", cards);
      table.classList.toggle("wide", wide && !cards);
    };
    layOut();
    PHONE.addEventListener("change", layOut);
    for (const row of table.querySelectorAll("tbody tr")) {
      [...row.children].forEach((cell, place) => {
        if (names[place] && place > 0) cell.dataset.column = names[place];
        cell.classList.toggle("blank", !cell.textContent.trim());
        replaceIn(cell, /(?<=\d[A-Z]\w*)(\+)(?=\d+[A-Z])/, () => ["+", document.createElement("wbr")]);
        if (wide && place === 0) heads.push(cell);
      });
    }
    if (wide) heads.forEach((cell) => replaceIn(cell, /(_)/, () => ["_", document.createElement("wbr")]));
  }
  for (const code of document.querySelectorAll("pre, code.literal")) {
    replaceIn(code, /((?<![\w-])--\w[\w.]*)/, (flag) => {
      const whole = document.createElement("span");
      whole.className = "whole";
      whole.textContent = flag;
      return [whole];
    });
  }
});

// Puts in the place of whatever the pattern's one group matches in an element's texts what `make` returns for it.
function replaceIn(element, pattern, make) {
  const texts = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
  const found = [];
  while (texts.nextNode()) found.push(texts.currentNode);
  for (const text of found) {
    const parts = text.data.split(pattern);
    if (parts.length > 1) text.replaceWith(...parts.flatMap((part, place) => (place % 2 ? make(part) : [part])));
  }
}
