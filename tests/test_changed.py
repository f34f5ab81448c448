"""Which files a change can affect, for `make test-changed`."""

from tests.changed import ROOT, distances


def affected(name: str) -> dict[str, int]:
    return {str(file.relative_to(ROOT)): distance for file, distance in distances([ROOT / name]).items()}


def test_imports_of_every_form_are_followed():
    found = affected("export/artefacts.py")
    assert found["export/artefacts.py"] == 0
    assert found["export/tflite.py"] == 1, "a relative import"
    assert found["jsurgery/commands/export.py"] == 1 + found["export/run_export.py"], "a lazy import"
    assert found["tests/export/test_command.py"] >= 1
    assert "tests/attention/test_token_order.py" not in found and "jsurgery/diffusion.py" not in found


def test_a_conftest_affects_the_tests_of_its_folder():
    found = affected("tests/surgery/conftest.py")
    assert found["tests/surgery/test_plan.py"] == 1 and "tests/wan/test_rope.py" not in found


def test_a_template_affects_the_files_that_name_it():
    (template,) = (ROOT / "jsurgery").rglob("page.html*")
    found = affected(str(template.relative_to(ROOT)))
    assert found["jsurgery/report/page.py"] == 1
