#define FA_TARGET portable
#define FA_LANES 8
#include "bottleneck_columns.h"
