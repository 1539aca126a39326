"""What all stages share, and nothing else: error lines, the command line, folders on disk, the report page."""
