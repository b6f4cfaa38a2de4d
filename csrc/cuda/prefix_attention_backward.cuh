// prefix_attention backward on the GPU.  Free of torch.
#pragma once
#include "prefix_attention_tiles.cuh"
