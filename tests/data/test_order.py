"""The order is a pure function of the position: the same for every number of workers, from wherever one starts."""

from __future__ import annotations

import numpy as np
import pytest

from nexus_scale.data.buckets import Bucket, Fit, assign, fit, standard_buckets
from nexus_scale.data.manifest import DataError
from nexus_scale.data.order import Order, Stock, derive, fixed_order, keyed_hash, mix, shares


def stock(samples: int, per_shard: int, buckets: int = 1, weight: float = 1.0) -> Stock:
    shards = np.full(-(-samples // per_shard), per_shard)
    shards[-1] = samples - per_shard * (len(shards) - 1)
    return Stock(shards, (keyed_hash(7, np.arange(samples)) % np.uint64(buckets)).astype(np.int32), weight)


def rank_positions(rank: int, world_size: int, micro: int, global_batch: int) -> list[int]:
    """As the loader cuts a global batch: micro-batch i of rank r has [(i*W + r)*m, ...+m)."""
    return [
        (i * world_size + rank) * micro + j for i in range(global_batch // (world_size * micro)) for j in range(micro)
    ]


def test_hash_is_splitmix64() -> None:
    # First outputs of the reference generator with seed 1234567 (Vigna's splitmix64.c).
    state = np.arange(1, 4)
    assert keyed_hash(1234567, state).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_the_order_itself_is_frozen() -> None:
    draw = Order([stock(40, 7)], seed=3, global_batch=8, window=2).batch(11)
    assert draw.samples.tolist() == FROZEN, "runs in progress would see other samples after an update"


FROZEN = [12, 5, 2, 4, 0, 6, 29, 28]


@pytest.mark.parametrize("seed", [0, 5])
def test_a_million_positions_over_many_worlds(seed: int) -> None:
    samples, batch = 10_007, 48 * 25
    order = Order([stock(samples, 100)], seed, batch)
    draws = -(-1_000_000 // batch)
    whole = np.concatenate([order.batch(d).samples for d in range(draws)])
    for world_size in (1, 2, 3, 4, 8):
        ranks = [Order([stock(samples, 100)], seed, batch) for _ in range(world_size)]
        for draw in (0, 1, 7, 8, 9, draws // 2, draws - 1):  # anywhere, without those before
            seen = np.full(batch, -1)
            for rank, own in enumerate(ranks):
                places = rank_positions(rank, world_size, 50, batch)
                seen[places] = own.batch(draw).samples[places]
            assert np.array_equal(seen, whole[draw * batch : (draw + 1) * batch])
    for epoch in range(len(whole) // samples):
        part = whole[epoch * samples : (epoch + 1) * samples]
        assert np.array_equal(np.sort(part), np.arange(samples))
    assert not np.array_equal(whole[:samples], whole[samples : 2 * samples])


def test_seeds_differ() -> None:
    first, second = (Order([stock(1000, 10)], seed, 100).batch(0).samples for seed in (0, 1))
    assert not np.array_equal(first, second)


def test_a_window_is_a_few_shards_and_well_mixed() -> None:
    order = Order([stock(1000, 10)], 0, 80, window=8)
    draw = order.batch(0)
    assert len(draw.windows) == 1 and set(draw.samples // 10) == set(draw.windows[0].shards)
    assert draw.windows[0].share == 1.0
    assert len(set(draw.samples[:16] // 10)) >= 5  # not shard after shard


def test_buckets_stay_apart_and_each_runs_its_own_epochs() -> None:
    source = stock(600, 50, buckets=3)
    order = Order([source], 1, 20, window=3, buckets=("a", "b", "c"))
    seen: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    for d in range(300):
        draw = order.batch(d)
        assert {"abc"[b] for b in source.bucket[draw.samples]} == {draw.bucket}
        seen[draw.bucket] += draw.samples.tolist()
    for name, ids in seen.items():
        own = np.flatnonzero(source.bucket == "abc".index(name))
        for epoch in range(len(ids) // len(own)):
            assert sorted(ids[epoch * len(own) : (epoch + 1) * len(own)]) == own.tolist()
        assert abs(len(ids) / 6000 - len(own) / 600) < 0.01


def test_sources_mix_by_weight_at_every_prefix() -> None:
    order = Order([stock(100, 10, weight=3.0), stock(5000, 50, weight=1.0)], 0, 50)
    drawn = [order.batch(d) for d in range(40)]
    sources = np.concatenate([d.sources for d in drawn])
    for prefix in (4, 50, 333, 2000):
        assert abs((sources[:prefix] == 0).mean() - 0.75) <= 1 / prefix
    small = np.concatenate([d.samples for d in drawn])[sources == 0]
    for epoch in range(len(small) // 100):
        assert sorted(small[epoch * 100 : (epoch + 1) * 100]) == list(range(100))
    for d in drawn:
        for place, window in enumerate(d.windows):
            assert set(d.sources[d.window == place]) <= {window.source}


def test_batches_drawn_together_are_those_drawn_one_by_one() -> None:
    sources = [stock(1000, 10, buckets=3, weight=3.0), stock(700, 7, buckets=3)]
    order = Order(sources, 5, 24, window=2, buckets=("a", "b", "c"))
    buckets = [order.batch(draw).bucket for draw in range(240)]
    longest = 0
    for draw in range(200):
        count = order.alike(draw, 40)
        assert set(buckets[draw : draw + count]) == {buckets[draw]}
        assert buckets[draw + count] != buckets[draw] and order.alike(draw, 1) == 1
        longest = max(longest, count)
        together, alone = order.batch(draw, count), [order.batch(d) for d in range(draw, draw + count)]
        assert (together.bucket, together.number, together.batches) == (buckets[draw], draw, count)
        assert np.array_equal(together.samples, np.concatenate([d.samples for d in alone]))
        assert np.array_equal(together.sources, np.concatenate([d.sources for d in alone]))
        windows = [d.windows[place] for d in alone for place in d.window]
        assert [together.windows[place] for place in together.window] == windows
        assert list(order.after(draw, count)) == list(order.after(draw + count - 1))
    assert longest > 1
    plain = Order([stock(1000, 10)], 5, 24)
    assert plain.alike(3, 40) == 40
    assert np.array_equal(plain.batch(3, 2).samples, np.concatenate([plain.batch(d).samples for d in (3, 4)]))


def test_a_batch_larger_than_the_data_goes_through_epochs() -> None:
    draw = Order([stock(10, 4)], 0, 35).batch(1)
    assert np.bincount(draw.samples, minlength=10).sum() == 35 and set(draw.samples) == set(range(10))


def test_mix_is_smooth_and_exact() -> None:
    assert shares([0.5, 0.3, 0.2]).tolist() == [5, 3, 2]
    assert shares([2731, 569]).tolist() == [2731, 569]
    pattern = mix((5.0, 1.0, 1.0)).pattern.tolist()
    assert pattern == [0, 0, 1, 0, 2, 0, 0]  # nginx's example
    assert mix((5.0, 1.0, 1.0)).counts_before(7 * 1000 + 3).tolist() == [5002, 1001, 1000]
    with pytest.raises(DataError, match="positive"):
        shares([1.0, 0.0])


@pytest.mark.parametrize(
    "weights",
    [
        (100_000.0, 1.0),
        (1.0, 1e-6, 50.0),
        (*[1.0] * 40, 1e7, 1e7),  # a long tail, rare together too
        (1e8, 1e4, 1.0, 2.0, 1.0),  # rare among the rare
        (1e9, *np.arange(1.0, 1000.0)),
    ],
    ids=["lone", "light source", "tail", "nested", "many"],
)
def test_a_rare_choice_has_its_share(weights: tuple[float, ...]) -> None:
    """It once had one place of 4,097, however small its share."""
    made = mix(weights)
    share = np.array(weights) / sum(weights)
    end = int(20 / share.min())
    for position in (end // 7, end, 1000 * end + 3):
        counts, expected = made.counts_before(position), share * position
        assert counts.sum() == position
        assert np.all((counts <= 2 * expected + 1) & (counts >= expected / 2 - 1)), (position, counts, expected)
    for first in (0, end // 3, 1000 * end - 1000):
        found = made.at(first, 30_000)
        counted = np.bincount(found, minlength=len(weights))
        assert np.array_equal(counted, made.counts_before(first + 30_000) - made.counts_before(first))
        assert np.array_equal(found, np.concatenate([made.at(first, 11), made.at(first + 11, 29_989)]))


def test_a_lone_sample_is_drawn_as_often_as_any_other() -> None:
    """In a bucket of its own, and in a source of one bucket, among 200,000."""
    bucket = np.zeros(200_001, np.int64)
    bucket[77] = 1
    apart = Order([Stock(np.array([200_001]), bucket)], seed=0, global_batch=1, buckets=("many", "one"))
    beside = Order([stock(200_000, 50_000, weight=200_000.0), stock(1, 1)], seed=0, global_batch=1)
    for seen in (
        np.array([apart.batch(draw).bucket == "one" for draw in range(99_000, 102_000)]),
        np.array([beside.batch(draw).sources[0] == 1 for draw in range(99_000, 102_000)]),
    ):
        assert seen.sum() == 1, "once in 200,001, in the middle"


def test_shares_that_a_pattern_holds_are_drawn_in_the_order_of_before() -> None:
    for weights, hashed in FROZEN_MIXES.items():
        made = mix(weights)
        assert made.rare is None and derive(*made.at(3, 9000).tolist()) == hashed, weights


FROZEN_MIXES = {
    (5.0, 1.0, 1.0): 15425740598755253832,
    (0.7, 0.2, 0.1): 3297537332981049146,
    (2731.0, 569.0): 13532033026827593346,
    (1 / 3, 2 / 3, 1e-3): 2883695361212415792,  # no pattern is exact
    (10007.0, 3.0, 411.0): 2458580951235464901,
    (1.0, 1 / 8000): 14010908125312950926,  # nearly twice its share, as ever
}


def test_fixed_order_depends_on_the_data_alone() -> None:
    sources, samples = fixed_order([30, 12], 100)
    assert sorted(zip(sources, samples, strict=True)) == [(0, i) for i in range(30)] + [(1, i) for i in range(12)]
    again = fixed_order([30, 12], 10)
    assert np.array_equal(again[1], samples[:10]) and derive(1, 2) != derive(2, 1)


def test_bucket_tables() -> None:
    assert standard_buckets(32, 32) == [(32, 32)]
    assert standard_buckets(512, 64) == [
        (384, 640),
        (448, 576),
        (512, 512),
        (576, 448),
        (640, 384),
    ]
    assert standard_buckets(512, 64, 3.0)[0] == (320, 768) and (704, 320) not in standard_buckets(512, 64, 3.0)
    table = standard_buckets(1024, 64, 2.0)
    assert table == [(b.height, b.width) for b in reversed(table)] and max(b.width * b.height for b in table) == 1024**2
    with pytest.raises(DataError, match="divides"):
        standard_buckets(500, 64)


def test_bucket_assignment() -> None:
    table = standard_buckets(512, 64)
    assert assign(1000, 1000, table) == (512, 512) == Bucket(512, 512)
    assert assign(1920, 1080, table) == (640, 384) and assign(1080, 1920, table).name == "640x384"
    assert assign(640, 384, table) == (640, 384)
    assert fit(640, 384, Bucket(640, 384)) == Fit(640, 384, 0, 0)
    assert fit(1000, 500, Bucket(512, 512)) == Fit(1024, 512, 256, 0)
    with pytest.raises(DataError, match="0 x 10"):
        assign(0, 10, table)


def test_balanced_classes_come_alike_and_each_class_runs_through_its_own_epochs() -> None:
    label = np.array([0] * 90 + [1] * 8 + [2] * 2)
    for balance, expected in ((0.0, [0.9, 0.08, 0.02]), (1.0, [1 / 3] * 3), (0.5, None)):
        order = Order(
            [Stock(np.array([60, 40]), np.zeros(100, np.int32), 1.0, label, balance)], seed=3, global_batch=20
        )
        drawn = np.concatenate([order.batch(i).samples for i in range(150)])
        found = np.bincount(label[drawn]) / len(drawn)
        shares = np.array([90, 8, 2]) ** 0.5
        np.testing.assert_allclose(found, expected or shares / shares.sum(), atol=0.01)
        for c in range(3):
            own = drawn[label[drawn] == c]
            size = int((label == c).sum())
            for epoch in range(len(own) // size):
                assert sorted(own[epoch * size : (epoch + 1) * size]) == list(np.flatnonzero(label == c))
