"""The peers, one file each: other libraries' implementations of ``local_attention``, and of its two products the seed's."""

from __future__ import annotations

from attnreg_benchmarks.contender import Contender
from attnreg_benchmarks.peers.cudnn_graph import CUDNN
from attnreg_benchmarks.peers.dense import DENSE
from attnreg_benchmarks.peers.flash2 import FLASH2
from attnreg_benchmarks.peers.flash4 import FLASH4
from attnreg_benchmarks.peers.flex import FLEX
from attnreg_benchmarks.peers.seed import SEED

PEERS: tuple[Contender, ...] = (FLASH2, FLASH4, CUDNN, FLEX, DENSE, SEED)
