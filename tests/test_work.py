"""Laws of the work table, in plain integers: what the kernels are told to do is the whole work, once."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
import torch

import hydragen.work
from hydragen import PrefixTree
from hydragen.kv import NodeKV, levels_tree, node_kv_of_levels, node_kv_of_packed
from hydragen.layout import ITEM_COLUMNS, LINK_COLUMNS
from hydragen.queries import Heads, Queries
from hydragen.target import H200, INTERPRETER, Target
from hydragen.work import WorkPlan, make_work_plan

A100 = Target(arch=80, num_sms=108, flops=312e12, bandwidth=2.0e12)
B200 = Target(arch=100, num_sms=148, flops=2000e12, bandwidth=8e12)
TARGETS = {"interpreter": INTERPRETER, "A100": A100, "H200": H200, "B200": B200}
# float32 of 128, and sizes that are no multiple of 8, have a single tile of 16 rows
HEADS = {
    "8/2 half": Heads(8, 2, 64, 64, 2),
    "4/4 half": Heads(4, 4, 128, 128, 2),
    "6/1 float": Heads(6, 1, 128, 96, 4),
    "32/1 half": Heads(32, 1, 33, 20, 2),
    "8/8 half": Heads(8, 8, 130, 130, 2),
}


def random_tree(rng: np.random.Generator) -> tuple[PrefixTree, np.ndarray]:
    """Return a forest of up to 7 nodes and 9 rows in any order, and the query tokens of each row."""
    num_nodes, num_rows = rng.integers(1, 8), rng.integers(1, 10)
    parents = [int(rng.integers(-1, node)) for node in range(num_nodes)]
    kv_lens = rng.choice([0, 1, 15, 16, 17, 33, 70], num_nodes)
    tree = PrefixTree.from_parents(parents, kv_lens, row_to_node=rng.integers(0, num_nodes, num_rows))
    return tree, rng.choice([0, 1, 1, 2, 7], num_rows)


def packed_nodes(tree: PrefixTree) -> NodeKV:
    nothing = torch.empty(0, 1, 1)
    return node_kv_of_packed(nothing, nothing, tree.kv_offsets)


def plan_of(
    tree: PrefixTree,
    q_lens: np.ndarray,
    heads: Heads,
    target: Target,
    batch_invariant: bool = False,
    nodes: NodeKV | None = None,
) -> WorkPlan:
    assert tree.kv_lens is not None
    starts = np.cumsum(q_lens) - q_lens
    where = packed_nodes(tree) if nodes is None else nodes
    return make_work_plan(tree, where, tree.kv_lens, False, starts, q_lens, heads, target, batch_invariant)


def plans() -> Iterator[WorkPlan]:
    """Plans of random trees, in every way to cut the work."""
    rng = np.random.default_rng(0)
    for number in range(60):
        tree, q_lens = random_tree(rng)
        heads = list(HEADS.values())[number % len(HEADS)]
        target = list(TARGETS.values())[number // len(HEADS) % len(TARGETS)]
        yield plan_of(tree, q_lens, heads, target, batch_invariant=number % 7 == 0)
    # little to do: rows that walk their paths on their own
    for number in range(30):
        tree, q_lens = random_tree(rng)
        yield plan_of(tree, np.minimum(q_lens, 1), HEADS["8/2 half"], list(TARGETS.values())[number % 4])
    # many suffixes of one row each: programs enough for several KV heads to share a tile
    star = PrefixTree.from_parents([-1] + [0] * 40, [100] + [20] * 40)
    for name in ("8/2 half", "4/4 half"):
        yield plan_of(star, np.ones(40, np.int64), HEADS[name], INTERPRETER)


@pytest.fixture(params=["as tuned", "short splits"])
def work(request: pytest.FixtureRequest) -> Iterator[list[WorkPlan]]:
    """Made for each test anew: mutation testing asks which tests run what is planned here."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "short splits":
            patch.setattr(hydragen.work, "split_size", lambda _, __, tile, *_3, **_4: tile.step)
        yield list(plans())


def entries(plan: WorkPlan) -> Iterator[tuple[dict[str, int], int, int, range]]:
    """Each segment of each item as (columns, block_m, rows per token, the rows of the item that it computes).

    `columns` also has the `number` of the item: other segments of it have the same.
    """
    number = 0
    for launch in plan.work.launches:
        rows_per_token = launch.heads * plan.heads.group_size
        for values in launch.items.tolist():
            item = dict(zip(ITEM_COLUMNS, values, strict=True)) | {"number": number}
            number += 1
            end = min(item["row_begin"] + launch.tile.block_m, item["num_tok"] * rows_per_token)
            computed = range(item["row_begin"], end)
            yield item, launch.tile.block_m, rows_per_token, computed
            second = values[-len(LINK_COLUMNS) :]
            place, more = item["link_begin"], item["num_segments"] - 2
            others = [second, *launch.links[place : place + max(more, 0)].tolist()]
            for link in others[: item["num_segments"] - 1]:
                further = item | dict(zip(LINK_COLUMNS, link, strict=True))
                yield further, launch.tile.block_m, rows_per_token, computed


def expected_pairs(plan: WorkPlan) -> Counter[tuple[int, int, int]]:
    """(query token in tree order, node, key) for every key on the token's path."""
    return Counter(
        (token, node, key)
        for token, row in enumerate(plan.queries.row.tolist())
        for node in plan.tree.path(row).tolist()
        for key in range(plan.kv_lens[node])
    )


def test_every_token_meets_every_key_of_its_path_once(work: list[WorkPlan]) -> None:
    for plan in work:
        pairs: Counter[tuple[int, int, int]] = Counter()
        rows: Counter[tuple[int, int, int, int]] = Counter()
        for item, _, rows_per_token, computed in entries(plan):
            assert computed, "an item without rows"
            assert item["begin"] < item["end"], "an item without keys"
            for row in computed:
                token = item["tok_begin"] + row // rows_per_token
                rows[token, row % rows_per_token, item["node"], item["begin"]] += 1
                if row % rows_per_token == 0:
                    pairs.update((token, item["node"], key) for key in range(item["begin"], item["end"]))
        assert pairs == expected_pairs(plan)
        assert set(rows.values()) <= {1}
        # and every head of a token, where one is computed
        heads_of = Counter((token, node, begin) for token, _, node, begin in rows)
        expected = {launch.heads * plan.heads.group_size for launch in plan.work.launches}
        assert set(heads_of.values()) <= expected


def test_programs_serve_all_heads(work: list[WorkPlan]) -> None:
    for plan in work:
        for launch in plan.work.launches:
            assert plan.heads.num_kv_heads % launch.heads == 0
            assert launch.heads == 1 or launch.heads * plan.heads.group_size <= launch.tile.block_m
    assert any(launch.heads > 1 for plan in work for launch in plan.work.launches)


def test_items_say_where_the_keys_lie(work: list[WorkPlan]) -> None:
    for plan in work:
        nodes = packed_nodes(plan.tree)
        for item, *_ in entries(plan):
            assert item["level"] == nodes.level[item["node"]]
            assert item["slot"] == nodes.slot[item["node"]]
            assert item["end"] <= plan.kv_lens[item["node"]]


def test_partial_rows_are_unique(work: list[WorkPlan]) -> None:
    for plan in work:
        owner: dict[int, tuple[int, int]] = {}
        of_item: dict[tuple[int, int], int] = {}  # row blocks of one split are other items
        for item, _, rows_per_token, computed in entries(plan):
            for row in computed:
                local = row // rows_per_token
                token = item["tok_begin"] + local
                split = of_item.setdefault((item["dest"] + local, token), item["dest"])
                mine = (token, split)
                assert owner.setdefault(item["dest"] + local, mine) == mine
        if plan.work.final:
            continue
        assert sorted(owner) == list(range(plan.work.num_partials))
        assert len(set(owner.values())) == len(owner)


def test_merge_lists_are_complete_and_go_from_root_to_leaf(work: list[WorkPlan]) -> None:
    seen = 0
    for plan in work:
        if plan.work.final:
            continue
        written = {}
        for item, _, rows_per_token, computed in entries(plan):
            for row in computed:
                token = item["tok_begin"] + row // rows_per_token
                written[token, item["node"], item["begin"]] = item["dest"] + row // rows_per_token
        indptr, indices = plan.work.merge_indptr.tolist(), plan.work.merge_indices.tolist()
        assert len(indptr) == plan.queries.token.size + 1
        for token, row in enumerate(plan.queries.row.tolist()):
            place = {node: depth for depth, node in enumerate(plan.tree.path(row).tolist())}
            mine = [(place[node], begin, dest) for (t, node, begin), dest in written.items() if t == token]
            # segments of one item, side by side on the path, have one partial together
            partials = [dest for dest, _ in groupby(dest for *_, dest in sorted(mine))]
            assert indices[indptr[token] : indptr[token + 1]] == partials
            assert len(set(partials)) == len(partials)
            seen += len(partials) > 1
    assert seen > 100, "hardly any token has two partials: this tests little"


def test_one_launch_per_kind_of_tile(work: list[WorkPlan]) -> None:
    for plan in work:
        kinds = [launch.tile for launch in plan.work.launches]
        assert len(kinds) == len(set(kinds))
        assert set(kinds) <= set(plan.work.tiles)
        assert all(launch.items.shape[0] > 0 for launch in plan.work.launches)


def test_launches_have_the_tiles_of_their_segments(work: list[WorkPlan]) -> None:
    used = set()
    for plan in work:
        segments = plan.work.segments
        planned = {
            (plan.work.tiles[tile], heads)
            for tile, heads in zip(segments.tile.tolist(), segments.heads.tolist(), strict=True)
        }
        assert {(launch.tile, launch.heads) for launch in plan.work.launches} == planned
        used |= planned
    assert len(used) > 1


def test_depth_and_nodes_add_no_launches() -> None:
    chain = PrefixTree.from_parents(np.arange(-1, 499), np.full(500, 3), row_to_node=[499] * 4)
    plan = plan_of(chain, np.ones(4, np.int64), HEADS["8/2 half"], H200)
    assert len(plan.work.launches) == 1


def test_final_means_one_partial_for_every_token(work: list[WorkPlan]) -> None:
    kinds = set()
    for plan in work:
        partials: dict[int, set[int]] = defaultdict(set)
        for item, _, rows_per_token, computed in entries(plan):
            for row in computed:
                if row % rows_per_token == 0:
                    partials[item["tok_begin"] + row // rows_per_token].add(item["number"])
        each_one = all(len(partials.get(token, ())) == 1 for token in range(plan.queries.token.size))
        assert plan.work.final == (each_one and not plan.batch_invariant)
        assert (plan.work.num_partials == 0) == (plan.work.final or not partials)
        kinds.add(plan.work.final)
    assert kinds == {True, False}


def test_the_longest_items_come_first(work: list[WorkPlan]) -> None:
    for plan in work:
        for launch in plan.work.launches:
            keys: dict[int, int] = defaultdict(int)
            for item, *_ in entries(replace(plan, work=replace(plan.work, launches=(launch,)))):
                keys[item["number"]] += item["end"] - item["begin"]
            assert list(keys.values()) == sorted(keys.values(), reverse=True)


def test_tokens_of_a_node_are_side_by_side() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        tree, q_lens = random_tree(rng)
        starts = np.cumsum(q_lens) - q_lens
        queries = Queries.of(tree, starts, q_lens)
        assert sorted(queries.token) == list(range(q_lens.sum()))
        assert queries.in_order == (queries.token.tolist() == list(range(q_lens.sum())))
        for node in range(tree.num_nodes):
            inside = [node in tree.path(row) for row in queries.row]
            begin, end = queries.begin[node], queries.end[node]
            assert inside == [begin <= i < end for i in range(len(inside))]
        for token, row, within in zip(queries.token, queries.row, queries.within, strict=True):
            assert token == starts[row] + within
            assert within < q_lens[row]


def test_levels_are_planned_like_packed_nodes() -> None:
    """Level and slot differ, nothing else does."""
    tree = replace(levels_tree((2, 4), 8), kv_lens=np.array([40, 3, 5, 17, 0, 9]))
    q_lens = np.ones(8, np.int64)
    levels = [(torch.empty(n, length, 2, 64),) * 2 for n, length in ((2, 40), (4, 17))]
    ours = plan_of(tree, q_lens, HEADS["8/2 half"], INTERPRETER, nodes=node_kv_of_levels(levels, tree))
    theirs = plan_of(tree, q_lens, HEADS["8/2 half"], INTERPRETER)
    places = [ITEM_COLUMNS.index(name) for name in ("level", "slot", "second_level", "second_slot")]
    for mine, other in zip(ours.work.launches, theirs.work.launches, strict=True):
        assert np.array_equal(np.delete(mine.items, places, 1), np.delete(other.items, places, 1))
        nodes = mine.items[:, ITEM_COLUMNS.index("node")]
        assert mine.items[:, places[0]].tolist() == tree.depth[nodes].tolist()
        assert mine.items[:, places[1]].tolist() == np.where(nodes < 2, nodes, nodes - 2).tolist()


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_batch_invariant_plans_a_path_alike_whatever_else_there_is(target: Target, heads: Heads) -> None:
    def path_of_first_row(others: int, q_len: int, leaves: int) -> list[tuple[object, ...]]:
        """Of one row with others on `leaves` leaves: tile, KV heads per program and split size."""
        ends = [1] + [1 + row % leaves for row in range(others)]
        tree = PrefixTree.from_parents(
            [-1] + [0] * leaves, [3, 5000] + [700] * (leaves - 1), row_to_node=ends
        )
        q_lens = np.array([1] + [q_len] * others)
        segments = plan_of(tree, q_lens, heads, target, batch_invariant=True).work.segments
        where = [np.flatnonzero(segments.node == node)[0] for node in (0, 1)]
        return [(segments.tile[i], segments.heads[i], segments.split_size[i]) for i in where]

    alone = path_of_first_row(0, 1, 1)
    for others, q_len, leaves in ((1, 1, 1), (3, 1, 2), (40, 1, 2), (600, 1, 600), (2, 64, 3)):
        assert path_of_first_row(others, q_len, leaves) == alone
