"""Where the operation may be cut across devices: batch and heads; everything else is whole on each device."""
