"""What a run will be on so many ranks, estimated without any of them: groups, memory, work, proposals."""
