//! Hostile images.
