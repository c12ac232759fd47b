"""Methods refuse what cannot be, when they are made; the grammar reads what it prints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import bigain_fx as bgx
from bigain_fx.passes.grammar import parse, parse_list
from bigain_fx.passes.methods import Method, normalize


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bgx.LaplacianMerge(0.76), r"ratio=0.76 must be between 0 and 0.75 for cell=\(2, 2\)"),
        (lambda: bgx.LaplacianMerge(-0.1), "ratio=-0.1 must be between 0 and 0.75"),
        (lambda: bgx.LaplacianMerge(float("nan")), "ratio=nan must be a finite number"),
        (lambda: bgx.LaplacianMerge("0.5"), "ratio='0.5' must be a finite number"),
        (lambda: bgx.LaplacianMerge((0.5, 0.8)), "ratio=0.8 must be between 0 and 0.75"),
        (lambda: bgx.LaplacianMerge(()), r"ratio=\(\) must be a number, or one for each attention"),
        (lambda: bgx.LaplacianMerge([0.5]), r"ratio=\[0.5\] must be a finite number"),
        (lambda: parse("tome:0.5/x"), "'tome:0.5/x' holds no valid number"),
        (lambda: bgx.LaplacianMerge(0.5, cell=(1, 1)), r"cell=\(1, 1\) must be two positive integers"),
        (lambda: bgx.LaplacianMerge(0.5, cell=(2, 0)), r"cell=\(2, 0\) must be two positive integers"),
        (lambda: bgx.LaplacianMerge(0.5, cell=2), "cell=2 must be two positive integers"),
        (lambda: bgx.LaplacianMerge(0.5, levels=0), "levels=0 must be a positive integer, or None"),
        (lambda: bgx.ToMe(0.5, seed=1.5), "seed=1.5 must be an integer"),
        (lambda: bgx.LaplacianMerge(cell_layout="column"), "cell_layout='column' must be 'block' or 'row'"),
        (lambda: bgx.BlockPool(unmerge="mean"), "unmerge='mean' must be 'copy' or 'blend'"),
        (lambda: bgx.ToMe(proportional=1), "proportional=1 must be True or False"),
        (lambda: parse("tome:0.5:proportional=yes"), "proportional='yes' must be True or False"),
        (lambda: bgx.ToMe(window=0), "window=0 must be a positive integer, or None for the whole grid"),
        (lambda: bgx.LaplacianMerge(window=(8, 8)), r"window=\(8, 8\) must be a positive integer"),
        (lambda: parse("tome:0.5:window=wide"), "'tome:0.5:window=wide' holds no valid number"),
        (lambda: parse("block-pool:0.5:window=8"), "is not a method; write dense"),
        (lambda: bgx.BlockPool(0.8), "ratio=0.8 must be between 0 and 0.75"),
        (lambda: bgx.ToMe(0.9), "ratio=0.9 must be between 0 and 0.75"),
        (lambda: bgx.KVDownsample(1), "factor=1 must be an integer of at least 2"),
        (lambda: bgx.KVDownsample(2.0), "factor=2.0 must be an integer"),
        (lambda: bgx.KVDownsample(2, float("inf")), "alpha=inf must be a finite number"),
        (lambda: bgx.KVDownsample(2, levels=True), "levels=True must be a positive integer"),
        (lambda: bgx.LinearAlpha(noisy=float("nan")), "noisy=nan must be a finite number"),
        (lambda: bgx.LinearAlpha(t_noisy=5, t_clean=5), "t_noisy=5 equals t_clean"),
        (lambda: bgx.ToDo(0), "factor=0 must be an integer of at least 2"),
        (lambda: normalize("bigain-tm:0.7"), "must be a LaplacianMerge"),
        (lambda: normalize([bgx.ToMe(), bgx.LaplacianMerge()]), "has 2 of kind 'merge'"),
        (lambda: normalize([bgx.ToDo(), bgx.KVDownsample()]), "has 2 of kind 'kv'"),
        (lambda: bgx.LaplacianMerge(where=""), "where='' must be a glob pattern of names"),
        (lambda: bgx.BlockPool(where=()), r"where=\(\) must be a glob pattern of names, such as .*, a tuple of these"),
        (lambda: bgx.ToDo(where=("*", 3)), r"where=\('\*', 3\) must be a glob pattern of names"),
        (lambda: bgx.KVDownsample(where=["*"]), r"where=\['\*'\] must be a glob pattern of names"),
        (lambda: bgx.ToMe(where="a.*,b.*"), "where='a.\\*,b.\\*' has one of : \\+ , / in it; write \\? in its place"),
        (lambda: parse("tome:0.5:where="), "where='' must be a glob pattern of names"),
        (lambda: parse("tome:0.5:where=a/"), r"where=\('a', ''\) must be a glob pattern of names"),
        (lambda: parse("bigain-tm"), "'bigain-tm' is not a method"),
        (lambda: parse("tomesd:0.5"), "'tomesd:0.5' is not a method; write dense"),
        (lambda: parse("tome:lots"), "'tome:lots' holds no valid number"),
        (lambda: parse("todo:2.5"), "'todo:2.5' holds no valid number"),
        (lambda: parse("tome:0.9"), "ratio=0.9 must be between"),
        (lambda: parse("tome:0.5+bigain-tm:0.5"), "has 2 of kind 'merge'"),
        (lambda: parse("tome:0.5:0.5"), "'tome:0.5:0.5' is not a method"),
        (lambda: parse("todo:2:block"), "'todo:2:block' is not a method"),
        (lambda: parse("todo:2:alpha=1"), "'todo:2:alpha=1' is not a method"),
        (lambda: parse("tome:0.5:seed=1:seed=2"), "is not a method; write dense"),
        (lambda: parse("tome:0.5:cell=2xtwo"), "'tome:0.5:cell=2xtwo' holds no valid number"),
        (lambda: parse("tome:0.5:cell=2"), r"cell=\(2,\) must be two positive integers"),
        (lambda: parse_list("dense,,"), "'' is not a method"),
    ],
)
def test_bad_values_are_one_line_errors(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(bgx.MethodError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("text", "methods"),
    [
        ("dense", ()),
        ("tome:0.7", (bgx.ToMe(0.7),)),
        ("bigain-tm:0.5", (bgx.LaplacianMerge(0.5),)),
        ("todo:4", (bgx.ToDo(4),)),
        ("bigain-td:2", (bgx.KVDownsample(2),)),
        ("bigain-td:2:-0.25", (bgx.KVDownsample(2, -0.25),)),
        ("bigain-td:2:0.8..1.2", (bgx.KVDownsample(2, bgx.LinearAlpha()),)),
        ("block-pool:0.5:block", (bgx.BlockPool(0.5, scope="block"),)),
        ("tome:0.5:seed=3", (bgx.ToMe(0.5, seed=3),)),
        ("bigain-tm:0.5:cell=2x4:levels=all:align=batch", (bgx.LaplacianMerge(0.5, (2, 4), None, align="batch"),)),
        ("bigain-tm:0.5:cell_layout=row", (bgx.LaplacianMerge(0.5, cell_layout="row"),)),
        ("bigain-tm:0.5:proportional=true", (bgx.LaplacianMerge(0.5, proportional=True),)),
        ("tome:0.25/0/0.75:unmerge=blend", (bgx.ToMe((0.25, 0, 0.75), unmerge="blend"),)),
        ("tome:0.5:window=16", (bgx.ToMe(0.5),)),
        ("tome:0.5:window=all", (bgx.ToMe(0.5, window=None),)),
        ("bigain-tm:0.5:window=all:block", (bgx.LaplacianMerge(0.5, scope="block", window=None),)),
        ("merge:0.5:window=all", (bgx.Merge(0.5, window=None),)),
        ("bigain-tm:0.5:window=8", (bgx.LaplacianMerge(0.5, window=8),)),
        ("todo:2:levels=3", (bgx.ToDo(2, 3),)),
        ("bigain-td:2:levels=all:0.5", (bgx.KVDownsample(2, 0.5, None),)),
        ("tome:0.5:where=*.attn1", (bgx.ToMe(0.5, where="*.attn1"),)),
        ("todo:2:where=Down.[!3].*/up_?", (bgx.ToDo(2, where=("Down.[!3].*", "up_?")),)),
        ("block-pool:0.5:where=a", (bgx.BlockPool(0.5, where=("a",)),)),
        ("bigain-tm:0.7 + bigain-td:2", (bgx.KVDownsample(2), bgx.LaplacianMerge(0.7))),
    ],
)
def test_the_grammar(text: str, methods: tuple[Method, ...]) -> None:
    assert parse(text) == methods
    if methods:
        assert parse("+".join(map(str, methods))) == methods


def test_a_list_keeps_its_order_and_its_words() -> None:
    assert list(parse_list("dense, bigain-td:2,tome:0.7")) == ["dense", "bigain-td:2", "tome:0.7"]


def by_size(site: object) -> bool:
    return True


def test_a_function_is_part_of_the_value() -> None:
    method = bgx.KVDownsample(2, where=by_size)
    assert method == bgx.KVDownsample(2, where=by_size) != bgx.KVDownsample(2, where=lambda site: True)
    assert hash(method) == hash(bgx.KVDownsample(2, where=by_size))
    assert str(method) == "bigain-td:2:0.9:where=by_size"


def test_methods_are_values() -> None:
    made = {bgx.LaplacianMerge(), bgx.LaplacianMerge(0.7, (2, 2), 1), bgx.ToMe(), bgx.KVDownsample(), bgx.ToDo()}
    assert len(made) == 4
    with pytest.raises(AttributeError):
        bgx.ToMe().ratio = 0.1  # type: ignore[misc]


def test_windows_are_the_default_and_the_whole_grid_is_said() -> None:
    for kind in (bgx.LaplacianMerge, bgx.ToMe, bgx.Merge):
        assert kind() == kind(window=16) != kind(window=None)
        assert str(kind(0.5, window=None)).endswith(":0.5:window=all")


def test_the_cap_of_a_cell_is_allowed() -> None:
    assert bgx.LaplacianMerge(0.875, cell=(2, 4)).ratio == 0.875
