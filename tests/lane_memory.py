"""The memory of a launch, its barriers, and who may touch which of it when.

Of each byte it is known which buffer of which block it belongs to; of each word, which warp wrote
and read it last, and how often its block had met by then. So it is an error if warps use a word
and only luck decides who comes first, although here all of them run in step.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

GAP = 256  # bytes between buffers
GROUP, WARP = 128, 32  # lanes
GLOBAL, SHARED = 1, 2  # owners of bytes; SHARED + i: block i; 0: nobody
MOST_BYTES = 2**20 - 1  # that a barrier can expect


def _up(value: int) -> int:
    return -(-value // 256) * 256


class Machine:
    """Memory, and the lanes of the clusters that run at a time: all threads of a cluster, and of
    its neighbors, in order.
    """

    def __init__(self, size: int) -> None:
        self.bytes = np.full(size, 0xFF, np.uint8)  # floats: NaN
        self.views = {n: self.bytes.view(f"<u{n}") for n in (2, 4)}
        self.owner = np.zeros(size, np.int16)
        self.end = 0
        self.followed = True  # the kernel in front is done; until then nothing of `late` is there
        self.late: list[tuple[int, int]] = []  # where buffers begin and end
        self.guess: Sequence[int] | None = None  # words of vectors of integers until then
        self.earlier: dict[int, Any] = {}  # by where a buffer begins: its words until then
        # of every two bytes: the warp that wrote it, or minus its barrier; when; that read it; when
        self.writer, self.written, self.reader, self.read = np.zeros((4, size // 2), np.int32)

    def take(self, shape: Sequence[int], dtype: Any, data: Any = None) -> int:
        """A new buffer in global memory."""
        begin, size = _up(self.end + GAP), int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._own(begin, size, GLOBAL)
        if data is not None:
            self.bytes[begin : begin + size] = np.ascontiguousarray(data).view(np.uint8).ravel()
        return begin

    def _own(self, begin: int, size: int, owner: int) -> None:
        assert begin + size + GAP <= len(self.bytes)
        self.owner[begin : begin + size] = owner
        self.end = max(self.end, begin + size)

    def windows(self, sizes: Sequence[int], blocks: int) -> list[int]:
        """Buffers in the shared memory of each block of a launch: where they lie in it."""
        self.writer[: self.end // 2 + 1] = self.reader[: self.end // 2 + 1] = 0
        self.shared, self.window, places = _up(self.end + GAP), 0, []
        for size in sizes:
            places.append(self.window)
            self.window = _up(self.window + size + GAP)
        for block in range(blocks):
            for place, size in zip(places, sizes, strict=True):
                self._own(self.shared + block * self.window + place, size, SHARED + block)
        return places

    def begin(self, first: int, clusters: int, cluster: int, groups: int) -> None:
        """Clusters from the `first` on, with new shared memory."""
        threads = GROUP * groups
        lane = np.arange(clusters * cluster * threads)
        self.thread, self.block = lane % threads, lane // threads
        self.rank, self.cluster = self.block % cluster, self.block // cluster
        self.n, self.local = first + self.cluster, lane // WARP
        self.warp = (1 + self.local + first * cluster * threads // WARP).astype(np.int32)
        self.of_cluster = cluster
        self.live = np.ones(len(lane), bool)
        self.followed = False
        self.epoch = np.zeros(clusters * cluster, np.int32)  # of a block: how often it met
        self.met = np.zeros(clusters, np.int32)  # how often a cluster did
        self.arrived = np.zeros(clusters, bool)
        self.barriers = Barriers(self)
        self.bytes[self.shared : self.end] = 0xFF
        for of_word in (self.writer, self.written, self.reader, self.read):
            of_word[self.shared // 2 : self.end // 2 + 1] = 0

    def finish(self) -> None:
        """Checks that nothing is under way."""
        self.barriers.settle()
        assert not self.arrived.any(), "blocks have arrived and do not meet"

    def follow(self) -> None:
        """All threads wait until the kernel in front is done."""
        assert self.live.all(), "not all lanes come here"
        self.followed = True

    def whole(self, live: np.ndarray, size: int) -> np.ndarray:
        """Of each `size` lanes whether they are live, which must all be or none."""
        parts = live.reshape(-1, size)
        assert (parts == parts[:, :1]).all(), "not all lanes come here"
        return parts[:, 0]

    def meet(self, live: np.ndarray) -> None:
        """`bar.sync` of blocks."""
        self.epoch += self.whole(live, len(live) // len(self.epoch))

    def meet_cluster(self, live: np.ndarray, arrive: bool) -> None:
        """`barrier.cluster`, whose arrival is relaxed: it orders nothing but new barriers."""
        live = self.whole(live, len(live) // len(self.met))
        assert (self.arrived[live] != arrive).all(), "arrives twice, or waits without arriving"
        self.arrived[live] = arrive
        if not arrive:
            self.met += live

    def far(self, address: np.ndarray, rank: np.ndarray, live: np.ndarray) -> np.ndarray:
        """`mapa`: the same place in another block of the cluster."""
        own = (address.astype(np.int64) - self.shared) // self.window
        assert (own == self.block)[live].all(), "not in the block's own shared memory"
        assert (rank < self.of_cluster)[live].all(), "no block of the cluster"
        moved = (rank.astype(np.int64) - self.rank) * self.window
        return (address.astype(np.int64) + moved).astype(np.uint32)

    def places(self, address: Any, size: int, live: np.ndarray, space: str) -> np.ndarray:
        """Addresses of the live lanes, checked."""
        at = np.broadcast_to(address, live.shape)[live].astype(np.int64)
        assert not (at % size).any(), "not aligned"
        owner = self.owner[at]
        mine = owner == SHARED + self.block[live]
        right = {"global": owner == GLOBAL, "shared": mine, "cluster": owner >= SHARED}
        right[""] = mine | right["global"]
        for begin, end in () if self.followed else self.late:
            early = (at >= begin) & (at < end)
            assert not early.any(), "does not wait for the kernel in front, which may make this"
        assert right[space].all(), f"outside of the buffers, or not {space or 'its own'}"
        assert (self.owner[at + size - 1] == owner).all(), "beyond the end of a buffer"
        return at

    def load(self, address: Any, count: int, live: np.ndarray, space: str = "") -> np.ndarray:
        """Neighboring words of each live lane, `[count, lane]`; 0 of the others."""
        got = np.zeros((count, len(live)), np.uint32)
        if live.any():
            at = self.places(address, 4 * count, live, space)[:, None] + 4 * np.arange(count)
            self._reads(at // 2, live)
            got[:, live] = self.views[4][at // 4].T
            for begin, words in () if self.followed else self.earlier.items():
                here = (at >= begin) & (at < begin + 4 * len(words))
                old = words[np.where(here, (at - begin) // 4, 0)]
                got[:, live] = np.where(here, old, got[:, live].T).T
        return got

    def store(
        self, address: Any, values: Sequence[np.ndarray], live: np.ndarray, space: str = ""
    ) -> None:
        """Writes neighboring numbers of each live lane."""
        if not live.any():
            return
        size, count = values[0].dtype.itemsize, len(values)
        at = self.places(address, size * count, live, space)[:, None] + size * np.arange(count)
        data = np.stack([np.broadcast_to(v, live.shape)[live] for v in values], 1)
        data, view = data.view(f"<u{size}"), self.views[size]
        same = view[at // size] == data
        warp, epoch = self._who(at // 2, live)
        assert (same | self._free(at // 2, warp, epoch, live)).all(), "overwrites what is in use"
        view[at // size] = data
        assert (view[at // size] == data).all(), "lanes write different numbers to one place"
        self.writer[at // 2], self.written[at // 2] = warp, epoch

    def store_async(
        self, at: np.ndarray, data: np.ndarray, barrier: np.ndarray, live: np.ndarray
    ) -> None:
        """Words `[live lane, count]` that arrive with a phase of a barrier."""
        index = at[:, None] // 2 + 2 * np.arange(data.shape[1])
        name = self.barriers.find(barrier, live)
        warp, epoch = self._who(index, live)
        assert self._free(index, warp, epoch, live).all(), "overwrites what is in use"
        self.views[4][index // 2] = data
        assert (self.views[4][index // 2] == data).all(), "lanes write to one place"
        self.writer[index] = -1 - name[:, None]
        self.written[index] = self.barriers.phase[name][:, None]
        self.barriers.complete(name, 4 * data.shape[1])

    def _who(self, index: np.ndarray, live: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The lanes' warps, and how often their blocks have met: never, for global memory."""
        shared = self.owner[index[:, 0] * 2] >= SHARED
        return self.warp[live][:, None], (self.epoch[self.block[live]] * shared)[:, None]

    def _there(
        self, index: np.ndarray, warp: np.ndarray, epoch: np.ndarray, live: np.ndarray
    ) -> np.ndarray:
        """Whether what was written there last has arrived for the warp."""
        writer, written = self.writer[index], self.written[index]
        there = (writer == 0) | (writer == warp) | (writer > 0) & (written < epoch)
        if not there.all():
            late = writer < 0
            name = np.where(late, -1 - writer, 0)
            there |= late & (self.barriers.seen[self.local[live][:, None], name] > written)
        return there

    def _free(self, index: Any, warp: Any, epoch: Any, live: np.ndarray) -> np.ndarray:
        """Whether a warp may write there."""
        reader = self.reader[index]
        read = (reader == 0) | (reader == warp) | (self.read[index] < epoch)
        return read & self._there(index, warp, epoch, live)

    def _reads(self, index: np.ndarray, live: np.ndarray) -> None:
        warp, epoch = self._who(index, live)
        assert self._there(index, warp, epoch, live).all(), "reads what may not have arrived"
        reader = self.reader[index]
        several = (reader != 0) & (reader != warp) & (self.read[index] == epoch)
        self.reader[index] = np.where(several, -1, warp)
        again = self.reader[index]
        self.reader[index[(again != warp) | several]] = -1
        self.read[index] = epoch


class Barriers:
    """`mbarrier`: by its number, what its phase waits for."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.address = machine, np.zeros(0, np.int64)
        self.count, self.pending, self.asked, self.bytes, self.phase = np.zeros((5, 0), np.int64)
        self.born = np.zeros((5, 0), np.int64)  # warp, block, its epoch, its cluster's, if fenced
        self.seen = np.zeros((len(machine.live) // WARP, 0), np.int32)  # phases, of each warp

    def open(self, address: Any, count: int, live: np.ndarray) -> None:
        """`mbarrier.init`."""
        m, at = self.machine, self.machine.places(address, 8, live, "shared")
        assert len(np.unique(np.concatenate([self.address, at]))) == len(self.address) + len(at)
        self.address = np.concatenate([self.address, at])
        more = lambda held, value: np.concatenate([held, np.full(len(at), value)])
        self.count, self.pending = more(self.count, count), more(self.pending, count)
        self.asked, self.bytes = more(self.asked, 0), more(self.bytes, 0)
        self.phase = more(self.phase, 0)
        block = m.block[live]
        met, none = m.met[m.cluster[live]], np.zeros(len(at), int)
        born = np.stack([m.local[live], block, m.epoch[block], met, none])
        self.born = np.concatenate([self.born, born], 1)
        self.seen = np.pad(self.seen, ((0, 0), (0, len(at))))
        self.order = np.argsort(self.address)

    def fence(self, live: np.ndarray) -> None:
        """`fence.mbarrier_init`: blocks know of these warps' barriers when the cluster has met."""
        self.born[4] |= np.isin(self.born[0], self.machine.local[live])

    def find(self, address: np.ndarray, live: np.ndarray) -> np.ndarray:
        """Numbers of the live lanes' barriers, which they must know of."""
        m, at = self.machine, address.astype(np.int64)
        place = np.searchsorted(self.address, at, sorter=self.order)
        name = self.order[np.minimum(place, len(self.order) - 1)]
        assert (self.address[name] == at).all(), "no barrier there"
        warp, block, epoch, met, fenced = self.born[:, name]
        known = (warp == m.local[live]) | (fenced > 0) & (m.met[m.cluster[live]] > met)
        known |= (block == m.block[live]) & (m.epoch[m.block[live]] > epoch)
        assert known.all(), "the barrier may not be there yet"
        return name

    def expect(self, address: Any, size: int, live: np.ndarray) -> None:
        """`mbarrier.arrive.expect_tx`."""
        if not live.any():
            return
        assert size <= MOST_BYTES
        name = self.find(self.machine.places(address, 8, live, "shared"), live)
        np.add.at(self.bytes, name, size)
        self.asked[name] = self.bytes[name]
        np.subtract.at(self.pending, name, 1)
        assert (self.pending[name] >= 0).all(), "arrives once more than is waited for"
        self._turn(name)

    def complete(self, name: np.ndarray, size: int) -> None:
        """So many bytes of each have come."""
        np.subtract.at(self.bytes, name, size)
        self._turn(name)

    def _turn(self, name: np.ndarray) -> None:
        done = np.unique(name)
        done = done[(self.pending[done] == 0) & (self.bytes[done] == 0)]
        self.phase[done] += 1
        self.pending[done] = self.count[done]

    def wait(self, address: Any, parity: Any, live: np.ndarray) -> None:
        """`mbarrier.try_wait.parity` until it is so. All warps run in step: it is now or never."""
        if not live.any():
            return
        m = self.machine
        name = self.find(m.places(address, 8, live, "shared"), live)
        parity = np.broadcast_to(parity, live.shape)[live]
        assert (parity < 2).all()
        assert (self.phase[name] % 2 != parity).all(), "waits for ever"
        self.seen[m.local[live], name] = self.phase[name]

    def settle(self) -> None:
        """Checks that of no phase a part has come."""
        unused = (self.bytes == self.asked) & (self.bytes > 0)
        done = (self.bytes == 0) & (self.pending == self.count)
        assert (done | unused).all(), "bytes that nobody waits for, or that do not come"
