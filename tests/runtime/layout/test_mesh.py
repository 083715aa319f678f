"""Mesh specs: what they say, what they refuse, and where they put each rank."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavecast.runtime.errors import ConfigError
from wavecast.runtime.layout.mesh import Coordinates, MeshSpec, split_even


def divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def meshes(draw):
    tp, pp, dp = (draw(st.integers(1, 6)) for _ in range(3))
    folded = draw(st.sampled_from(divisors(tp * dp)))
    etp = draw(st.sampled_from(divisors(folded)))
    return MeshSpec(tp=tp, pp=pp, dp=dp, ep=folded // etp, etp=etp)


@pytest.mark.parametrize(
    ("text", "mesh"),
    [
        ("", MeshSpec()),
        ("  ", MeshSpec(1, 1, 1, 1, 1)),
        ("tp=3", MeshSpec(tp=3, etp=3)),
        ("tp=2,pp=2,dp=2,ep=4,etp=1", MeshSpec(2, 2, 2, 4, 1)),
        (" dp = 4 , ep=2 ", MeshSpec(dp=4, ep=2, etp=1)),
        ("tp=4,dp=2,ep=2", MeshSpec(4, 1, 2, 2, 4)),
    ],
)
def test_a_spec_says_its_sizes(text, mesh):
    assert MeshSpec.parse(text) == mesh


@pytest.mark.parametrize(
    ("text", "etp"),
    [
        ("tp=4,ep=4", 1),
        ("tp=4,ep=2", 2),
        ("tp=4,dp=2,ep=4", 2),
        ("tp=4,dp=4,ep=4", 4),
        ("tp=6,dp=2,ep=3", 2),
        ("tp=6", 6),
    ],
)
def test_an_expert_keeps_as_much_of_tp_as_the_stage_has_room_for(text, etp):
    assert MeshSpec.parse(text).etp == etp


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tp=0", "tp='0' is not a positive integer"),
        ("tp=-2", "tp='-2' is not a positive integer"),
        ("tp=2.0", "tp='2.0' is not a positive integer"),
        ("tp=two", "tp='two' is not a positive integer"),
        ("pp=", "pp='' is not a positive integer"),
        ("tp=\N{ARABIC-INDIC DIGIT TWO}", "is not a positive integer"),
        ("tp=1_0", "tp='1_0' is not a positive integer"),
        ("tp=" + "9" * 5000, "is not a positive integer"),
        ("tp=2,tp=4", "tp is given twice, as 2 and as 4"),
        ("cp=2", "'cp=2' is not AXIS=SIZE with an axis of tp, pp, dp, ep, etp"),
        ("tp", "'tp' is not AXIS=SIZE"),
        ("tp=2,", "'' is not AXIS=SIZE"),
        ("etp=0", "etp='0' is not a positive integer"),
        ("tp=2,ep=4,etp=1", "ep=4 times etp=1 does not divide the tp=2 times dp=1 actors of a pipeline stage"),
        ("tp=2,ep=2,etp=2", "ep=2 times etp=2 does not divide"),
        ("tp=3,dp=2,ep=4", "ep=4 times etp=1 does not divide"),
    ],
)
def test_a_bad_spec_is_refused_by_axis_and_value(text, message):
    with pytest.raises(ConfigError, match=message):
        MeshSpec.parse(text)


@pytest.mark.parametrize("axis", ["tp", "pp", "dp", "ep", "etp"])
@pytest.mark.parametrize("size", [-1, True, 1.0, "2", None])
def test_a_size_that_is_no_positive_integer_is_refused(axis, size):
    with pytest.raises(ConfigError, match=f"mesh axis {axis}=.* is not a positive integer"):
        MeshSpec(**{axis: size})


def test_a_size_of_zero_is_refused_except_where_it_asks_for_the_default():
    for axis in ("tp", "pp", "dp", "ep"):
        with pytest.raises(ConfigError, match=f"mesh axis {axis}=0 is not a positive integer"):
            MeshSpec(**{axis: 0})

    assert MeshSpec(tp=2, etp=0).etp == 2


@given(meshes())
def test_a_mesh_reads_back_from_its_text(mesh):
    assert MeshSpec.parse(str(mesh)) == mesh


@pytest.mark.parametrize(
    ("mesh", "text"),
    [
        (MeshSpec(), "tp=1"),
        (MeshSpec(dp=4, ep=2), "dp=4,ep=2"),
        (MeshSpec(tp=2, pp=3), "tp=2,pp=3"),
        (MeshSpec(tp=2, dp=2, ep=2, etp=1), "tp=2,dp=2,ep=2,etp=1"),
        (MeshSpec(tp=4, ep=4, etp=1), "tp=4,ep=4"),
    ],
)
def test_the_text_leaves_out_what_is_default(mesh, text):
    assert str(mesh) == text


@given(meshes())
def test_ranks_are_numbered_as_megatron_numbers_them(mesh):
    dense = np.arange(mesh.world_size).reshape(mesh.pp, mesh.dp, mesh.tp)
    expert = np.arange(mesh.world_size).reshape(mesh.pp, -1, mesh.ep, mesh.etp)
    for rank in range(mesh.world_size):
        pp, dp, tp = np.argwhere(dense == rank)[0]
        also_pp, edp, ep, etp = np.argwhere(expert == rank)[0]
        assert pp == also_pp
        assert mesh.coordinates(rank) == Coordinates(tp=tp, dp=dp, pp=pp, etp=etp, ep=ep, edp=edp)


def test_coordinates_of_a_folded_mesh():
    mesh = MeshSpec.parse("tp=2,pp=2,dp=6,ep=4,etp=1")
    assert mesh.world_size == 24
    assert mesh.stage_size == 12
    assert mesh.coordinates(0) == Coordinates(tp=0, dp=0, pp=0, etp=0, ep=0, edp=0)
    assert mesh.coordinates(7) == Coordinates(tp=1, dp=3, pp=0, etp=0, ep=3, edp=1)
    assert mesh.coordinates(23) == Coordinates(tp=1, dp=5, pp=1, etp=0, ep=3, edp=2)


@pytest.mark.parametrize("rank", [-1, 6])
def test_a_rank_outside_the_world_is_refused(rank):
    with pytest.raises(ValueError, match=f"rank {rank} is not in a world of 6"):
        MeshSpec(tp=3, pp=2).coordinates(rank)


@pytest.mark.parametrize(
    ("n", "parts", "expected"),
    [
        (7, 3, [(0, 3), (3, 5), (5, 7)]),
        (4, 3, [(0, 2), (2, 3), (3, 4)]),
        (6, 4, [(0, 2), (2, 4), (4, 5), (5, 6)]),
        (2, 3, [(0, 1), (1, 2), (2, 2)]),
        (0, 2, [(0, 0), (0, 0)]),
    ],
)
def test_the_first_parts_take_the_remainder(n, parts, expected):
    assert [split_even(n, parts, index) for index in range(parts)] == expected


@given(st.integers(0, 200), st.integers(1, 30))
def test_an_even_split_is_numpys(n, parts):
    cuts = np.array_split(np.arange(n), parts)
    assert [list(range(*split_even(n, parts, index))) for index in range(parts)] == [list(cut) for cut in cuts]


@pytest.mark.parametrize("index", [-1, 3])
def test_a_part_that_is_not_there_is_refused(index):
    with pytest.raises(ValueError, match=f"part {index} is not among 3 parts"):
        split_even(7, 3, index)
