"""The draws by hash follow their formula."""

from __future__ import annotations

import hashlib
import threading

import pytest

from raypipe.sources.id_sampling import in_sample, part_rule

IDS = [f"train/{number}.png" for number in range(300)] + ["", "é", "a\udc80", "x" * 5000]


def number(sample_id: str, key: bytes, person: bytes = b"") -> int:
    content = sample_id.encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(content, digest_size=8, key=key, person=person).digest()
    return int.from_bytes(digest, "little")


@pytest.mark.parametrize("purpose", [b"", b"audit"])
@pytest.mark.parametrize("seed", [0, 7, 2**60])
def test_draws(seed: int, purpose: bytes) -> None:
    rule, key = in_sample(0.3, seed, purpose), seed.to_bytes(16, "little") + purpose
    drawn = [rule(sample_id) for sample_id in IDS]
    assert drawn == [number(sample_id, key) < int(0.3 * 2**64) for sample_id in IDS]
    assert 0.2 < sum(drawn) / len(drawn) < 0.4


@pytest.mark.parametrize("parts", [2, 3])
def test_parts(parts: int) -> None:
    rule, key = part_rule(parts, 5), (5).to_bytes(16, "little")
    plain = [number(sample_id, key, b"raypipe-part") * parts // 2**64 for sample_id in IDS]
    assert [rule(sample_id) for sample_id in IDS] == plain
    assert set(plain) == set(range(parts))


def test_threads_share_a_rule() -> None:
    rule, found = in_sample(0.5, 1), []
    alone = [rule(sample_id) for sample_id in IDS]

    def draw() -> None:
        found.append([rule(sample_id) for sample_id in IDS * 5])

    threads = [threading.Thread(target=draw) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone * 5] * 8
