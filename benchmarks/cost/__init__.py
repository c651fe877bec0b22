"""What a step costs: `table.py` against other ways, `scaling.py` over sizes, `gpu.py` on a GPU."""
