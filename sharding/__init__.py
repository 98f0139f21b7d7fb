"""Where the operation may be cut across devices: batch, heads and pages; everything else is whole on each device."""
