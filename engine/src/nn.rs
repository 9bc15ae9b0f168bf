//! Differentiable layers.
