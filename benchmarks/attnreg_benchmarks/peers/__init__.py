"""The peers, one file each: what is no backend. Of ``local_attention``, other libraries'; of its two products, the seed's."""

from __future__ import annotations

from attnreg_benchmarks.contender import Contender
from attnreg_benchmarks.peers.blocks import BLOCKS
from attnreg_benchmarks.peers.cudnn_graph import CUDNN
from attnreg_benchmarks.peers.dense import DENSE
from attnreg_benchmarks.peers.flash2 import FLASH2
from attnreg_benchmarks.peers.flex_on_cpu import FLEX
from attnreg_benchmarks.peers.seed import SEED

PEERS: tuple[Contender, ...] = (FLASH2, CUDNN, DENSE, BLOCKS, FLEX, SEED)
