"""Pure numpy: recordings, windows, rendering of events, event-camera simulator, driving scenes."""
