"""Bridges to other adapter libraries; each module needs its library, and nothing else needs the modules."""
