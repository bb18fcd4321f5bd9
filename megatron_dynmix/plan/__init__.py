"""What a run will be on so many ranks, reckoned without any of them: groups, memory, work, proposals."""
