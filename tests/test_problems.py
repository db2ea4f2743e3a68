"""Settings inside messages, and problems collected."""

import pytest

from checkpoints.errors import ArgumentError, InputError, Refusals, WriteError
from checkpoints.problems import Problems
from checkpoints.settings import CLOSE, OPEN, Remark, as_flag, in_file, setting, shown


def in_recipe(name, value):
    return f"recipe.yml: aim.{name}" + ("" if value is None else f": {value}")


def test_each_door_shows_a_setting_in_its_own_way():
    error = ArgumentError(f"{setting('n_samples', 0)}: expected at least 1. See {setting('block_size')}.")
    assert str(error) == "n_samples 0: expected at least 1. See block_size."
    assert str(error.shown(as_flag)) == "--n_samples 0: expected at least 1. See --block_size."
    assert (
        str(error.shown(in_recipe))
        == "recipe.yml: aim.n_samples: 0: expected at least 1. See recipe.yml: aim.block_size."
    )
    assert error.shown(as_flag).exit_code == 2


def test_what_a_door_has_shown_stays_so():
    error = InputError(f"{setting('only')}: nothing.").shown(in_recipe)
    assert str(error.shown(as_flag)) == "recipe.yml: aim.only: nothing."


def test_an_error_with_arguments_of_its_own_is_shown_too(tmp_path):
    error = WriteError(tmp_path, OSError(28, "No space left"))
    assert type(error.shown(as_flag)) is WriteError
    assert str(error.shown(as_flag)) == str(error)


def test_a_file_s_door_leaves_what_the_file_does_not_give_to_the_next():
    error = ArgumentError(f"{setting('n_samples', 0)}: no, with {setting('numerics', 'reference')}.").shown(
        in_file({"n_samples": "r.yml: aim.n_samples"})
    )
    assert str(error.shown(as_flag)) == "r.yml: aim.n_samples 0: no, with --numerics reference."
    assert str(Refusals([error, "two."]).shown(as_flag)).startswith(
        "2 problems:\n- r.yml: aim.n_samples 0: no, with --n"
    )


def test_a_name_with_what_it_belongs_to():
    error = InputError(f"{setting('calibration.seed', -1)}: no.")
    assert (str(error), str(error.shown(as_flag))) == ("seed -1: no.", "--calibration_seed -1: no.")


def test_a_remark_is_text_that_each_door_shows():
    remark = Remark(f"left out by {setting('only')}.")
    assert remark == "left out by only."
    assert shown({"notes": [remark, "x", 1]}, as_flag) == {"notes": ["left out by --only.", "x", 1]}


def test_a_value_cannot_close_its_mark_and_a_lone_mark_is_escaped():
    assert str(InputError(setting("only", f"a{CLOSE}{OPEN}b"))) == "only a??b"
    assert str(InputError(f"{OPEN}x y{CLOSE}.")) == "?x y?."


def test_refusals_show_the_settings_of_all():
    both = Refusals([ArgumentError(f"{setting('seed')}: no."), f"{setting('omega')}: no."])
    assert str(both.shown(as_flag)) == "2 problems:\n- --seed: no.\n- --omega: no."
    assert both.shown(as_flag).exit_code == both.exit_code == 1


def test_problems_are_collected_in_order_and_once():
    problems = Problems()
    problems.raise_if_any()
    with problems.collect():
        raise Refusals(["one.", "two."])
    with problems.collect():
        raise ArgumentError("two.")
    problems.add("three.")
    problems.note("by the way")
    assert [str(problem) for problem in problems] == ["one.", "two.", "three."]
    assert problems.notes == ["by the way"]
    with pytest.raises(Refusals, match=r"3 problems:\n- one.\n- two.\n- three."):
        problems.raise_if_any()


def test_problems_of_a_part_are_taken_over_with_their_notes():
    part = Problems(["two.", "three."], ["of the part"])
    whole = Problems(["one.", "two."], ["of the whole"])
    whole.take(part)
    assert [str(problem) for problem in whole] == ["one.", "two.", "three."]
    assert whole.notes == ["of the whole", "of the part"]
    assert part.notes == ["of the part"]


def test_what_is_no_input_error_passes_through():
    problems = Problems()
    with pytest.raises(KeyError), problems.collect():
        raise KeyError("x")
    assert not problems


def test_a_message_lists_ten_problems_and_counts_the_rest():
    ten = [f"problem {number}." for number in range(10)]
    assert str(Refusals(ten)).count("\n- problem") == 10
    many = Refusals([*ten, "eleven.", "twelve."])
    assert str(many).splitlines()[:2] == ["12 problems:", "- problem 0."]
    assert str(many).splitlines()[-2:] == ["- problem 9.", "- and 2 more"]
    assert [str(problem) for problem in many.problems][-1] == "twelve."
    assert str(many.shown(as_flag)) == str(many)
