"""KV compression, indexing, sparse and latent attention, caches."""

from isolith.ops.attention.compress_indices import compress_indices as compress_indices
from isolith.ops.attention.grouped_output_proj import grouped_output_proj as grouped_output_proj
from isolith.ops.attention.hybrid_attention import hybrid_attention as hybrid_attention
from isolith.ops.attention.indexer_score import indexer_score as indexer_score
from isolith.ops.attention.indexer_topk import indexer_topk as indexer_topk
from isolith.ops.attention.kv_cache_read import kv_cache_read as kv_cache_read
from isolith.ops.attention.kv_cache_write import kv_cache_write as kv_cache_write
from isolith.ops.attention.kv_compress import kv_compress as kv_compress
from isolith.ops.attention.lightning_indexer import lightning_indexer as lightning_indexer
from isolith.ops.attention.mla_attention import mla_attention as mla_attention
from isolith.ops.attention.sparse_attn import sparse_attn as sparse_attn
from isolith.ops.attention.window_indices import window_indices as window_indices
