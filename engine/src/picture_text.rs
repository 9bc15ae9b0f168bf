//! What the small Flux reads: MiniLM's states of an instruction, in the one form that both
//! training and editing use.
//!
//! Flux sees a fixed number of text tokens and no mask. MiniLM's states are small and of
//! uneven length, so each token is brought to mean 0 and variance 1 over its channels, and
//! places beyond the text are 0. The pooled vector, of length 1, is multiplied by the square
//! root of its size, for the same variance.

use crate::Result;
use crate::text_vectors::TextEncoder;
use candle_core::{D, Tensor};

/// Token states (b, tokens, dim) and pooled vectors (b, dim) of instructions; texts longer
/// than `tokens` are cut. The empty text stands for "no instruction".
pub fn picture_text(
    encoder: &TextEncoder,
    texts: &[&str],
    tokens: usize,
) -> Result<(Tensor, Tensor)> {
    let seen = encoder.encode_tokens(texts, tokens)?;
    let centered = seen
        .states
        .broadcast_sub(&seen.states.mean_keepdim(D::Minus1)?)?;
    let spread = centered.sqr()?.mean_keepdim(D::Minus1)?;
    let normed = centered.broadcast_div(&(spread + 1e-6)?.sqrt()?)?;
    let masked = normed.broadcast_mul(&seen.mask.unsqueeze(2)?)?;
    let missing = tokens.saturating_sub(masked.dim(1)?);
    let states = masked.pad_with_zeros(1, 0, missing)?;
    let pooled = (seen.pooled * (encoder.dim as f64).sqrt())?;
    Ok((states, pooled))
}
