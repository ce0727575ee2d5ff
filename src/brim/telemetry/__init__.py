"""What happened, for whoever watches: today one line on stderr per notable event."""
