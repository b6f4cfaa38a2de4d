from .bottleneck import bottleneck, bottleneck_reference

__all__ = ["bottleneck", "bottleneck_reference"]
