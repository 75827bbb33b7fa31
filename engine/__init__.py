"""What makes a run: configuration, files, processes, figures. Nothing here is needed to understand a paper."""
