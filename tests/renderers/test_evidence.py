"""Evidence reads as words and numbers with units."""

from __future__ import annotations

from traceml.renderers.evidence import evidence_items


def test_numbers_get_their_units() -> None:
    evidence = {
        "step_ms": 30.254,
        "dominance": 0.955,
        "steps": 1590,
        "rss_bytes": 2**30,
        "waited_s": 12.5,
        "cpu_pct": 40,
        "competing_processes": {"ffmpeg": 0.535},
        "others_cores": 2,
        "busy_cores_per_rank": 0.3125,
        "speedup_with_data_ready": 3.194,
    }

    assert evidence_items(evidence) == [
        ("step", "30.3 ms"),
        ("dominance", "96 %"),
        ("steps", "1,590"),
        ("rss", "1.00 GiB"),
        ("waited", "12.5 s"),
        ("cpu", "40 %"),
        ("competing processes: ffmpeg", "0.5 cores"),
        ("others cores", "2 cores"),
        ("busy cores per rank", "0.3 cores"),
        ("speedup with data ready", "3.2x"),
    ]


def test_maps_tell_whose_number_it_is() -> None:
    """Keys are ranks or phases; nested maps are only in the report."""
    evidence = {
        "excess_ms_by_phase": {"forward": 15.1, "input_wait": 0.7},
        "hosts": {"2": "vm"},
        "deep": {"a": {"b": 1}},
    }

    assert evidence_items(evidence) == [
        ("excess by phase: forward", "15.1 ms"),
        ("excess by phase: input", "700 us"),
        ("hosts: rank 2", "vm"),
    ]


def test_lists_and_long_maps_are_cut() -> None:
    assert evidence_items({"ranks": list(range(20)), "note": "late", "seen": True, "nothing": None}) == [
        ("ranks", "0, 1, 2, 3, 4, 5, 6, 7, ..."),
        ("note", "late"),
        ("seen", "yes"),
    ]
    assert len(evidence_items({"ms_by_rank": {str(rank): 1.0 for rank in range(100)}})) == 8


def test_the_stack_of_an_exception_keeps_its_lines() -> None:
    """Marks below a line are left out: they fit only where all letters are equally wide."""
    stack = '  File "train.py", line 4, in f\n    x = a ^ b\n        ~~^~~\n  File "b.py", line 2, in g\n    ~y\n    ^^'

    ((label, text),) = evidence_items({"stack": stack})

    assert label == "stack"
    assert text.splitlines() == [
        '  File "train.py", line 4, in f',
        "    x = a ^ b",
        '  File "b.py", line 2, in g',
        "    ~y",
    ]


def test_a_number_beyond_any_count_has_few_digits() -> None:
    """The last loss before a divergence may have 37 digits, which filled two lines of the page."""
    evidence = {"last_finite_loss": -8.94372e36, "steps": 10**14, "loss": float("inf")}

    assert evidence_items(evidence) == [
        ("last finite loss", "-8.944e+36"),
        ("steps", "100,000,000,000,000"),
        ("loss", "inf"),
    ]
