"""Hyper-connections."""

from isolith.ops.residual.hc_head import hc_head as hc_head
from isolith.ops.residual.hc_post import hc_post as hc_post
from isolith.ops.residual.hc_pre import hc_pre as hc_pre
from isolith.ops.residual.sinkhorn import sinkhorn as sinkhorn
