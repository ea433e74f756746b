"""One kind of edit each. A pass reads the plan and decides nothing; the order is in `rewriting`."""
