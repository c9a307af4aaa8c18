"""Which part of a model goes to which device.

::

    device_map={…}                 as it is given
    device_map="sequential"        infer_device_map
    device_map="balanced_low_0"    even budgets ─→ infer_device_map
    device_map="auto", "balanced"  even budgets ─→ infer_device_map ─→ choose_resident
                                        ↓
                                   a device map, checked
"""
