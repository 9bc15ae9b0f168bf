//! Pieces of a transformer block as single graph nodes, for training on a CPU.
//!
//! Written with candle's ops, a modulated norm is a dozen passes over the data and its
//! gradient three dozen, and the matrix products take but a seventh of a small model's
//! training step. Each function here is one pass forwards and one or two backwards. All are
//! for f32 on the CPU; callers ask [`crate::conv::learns_on_cpu`] first.

use crate::conv::{fast_exp, values};
use crate::nn::{attach1, attach2, attach3};
use candle_core::{Device, Result, Tensor};

fn tensor(values: Vec<f32>, like: &Tensor) -> Result<Tensor> {
    Tensor::from_vec(values, like.shape(), &Device::Cpu)
}

/// gelu in its tanh form: x·sigmoid(2u), u = √(2/π)(x + 0.044715 x³).
pub fn gelu_tanh(x: &Tensor) -> Result<Tensor> {
    const TWO_ROOT: f32 = 1.595_769; // 2·√(2/π)
    const CUBIC: f32 = 0.044_715;
    let sigmoid = |x: f32| 1.0 / (1.0 + fast_exp(-TWO_ROOT * (x + CUBIC * x * x * x)));
    let mut out = values(x)?;
    out.iter_mut().for_each(|x| *x *= sigmoid(*x));
    attach1(x, &tensor(out, x)?, move |x, _, g| {
        let (mut to_x, gs) = (values(x)?, values(g)?);
        for (x, g) in to_x.iter_mut().zip(&gs) {
            let s = sigmoid(*x);
            let slope = TWO_ROOT * (1.0 + 3.0 * CUBIC * *x * *x);
            *x = g * (s + *x * s * (1.0 - s) * slope);
        }
        Ok(Some(tensor(to_x, x)?))
    })
}

/// y + b along the last dimension; b (n).
pub fn add_bias(y: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let (mut out, b) = (values(y)?, values(bias)?);
    for row in out.chunks_exact_mut(b.len()) {
        row.iter_mut().zip(&b).for_each(|(y, b)| *y += b);
    }
    attach2(y, bias, &tensor(out, y)?, move |_, bias, _, g| {
        let mut to_bias = vec![0f32; bias.elem_count()];
        add_rows(&mut to_bias, &values(g)?);
        Ok((Some(g.clone()), Some(tensor(to_bias, bias)?)))
    })
}

/// Adds all rows of `rows` to `sum`.
fn add_rows(sum: &mut [f32], rows: &[f32]) {
    for row in rows.chunks_exact(sum.len()) {
        sum.iter_mut().zip(row).for_each(|(s, r)| *s += r);
    }
}

/// LayerNorm without weights (eps 1e-6), then ·(1 + scale) + shift, where shift and scale are
/// parts `part` and `part + 1` of `modulation` (b, k·d). x (b, t, d).
pub fn modulated_norm(x: &Tensor, modulation: &Tensor, part: usize) -> Result<Tensor> {
    let (b, t, d) = x.dims3()?;
    let (mut out, mods) = (values(x)?, values(modulation)?);
    let wide = mods.len() / b;
    let mut scales = Vec::with_capacity(b * t);
    let mut normed = vec![0f32; out.len()];
    for (i, (row, normed)) in out
        .chunks_exact_mut(d)
        .zip(normed.chunks_exact_mut(d))
        .enumerate()
    {
        let at = (i / t) * wide + part * d;
        let (shift, scale) = (&mods[at..at + d], &mods[at + d..at + 2 * d]);
        let mean = row.iter().sum::<f32>() / d as f32;
        let spread = row.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / d as f32;
        let inverse = 1.0 / (spread + 1e-6).sqrt();
        scales.push(inverse);
        for (((x, n), s), a) in row.iter_mut().zip(normed).zip(scale).zip(shift) {
            *n = (*x - mean) * inverse;
            *x = *n * (1.0 + s) + a;
        }
    }
    attach2(
        x,
        modulation,
        &tensor(out, x)?,
        move |x, modulation, _, g| {
            let (gs, mods) = (values(g)?, values(modulation)?);
            let mut to_mod = vec![0f32; mods.len()];
            let mut to_x = vec![0f32; gs.len()];
            let rows = gs.chunks_exact(d).zip(normed.chunks_exact(d));
            for (i, ((g, n), to)) in rows.zip(to_x.chunks_exact_mut(d)).enumerate() {
                let at = (i / t) * wide + part * d;
                let scale = &mods[at + d..at + 2 * d];
                let (to_shift, to_scale) = to_mod[at..at + 2 * d].split_at_mut(d);
                let (mut total, mut along) = (0f32, 0f32);
                for j in 0..d {
                    let inner = g[j] * (1.0 + scale[j]);
                    to_shift[j] += g[j];
                    to_scale[j] += g[j] * n[j];
                    to[j] = inner;
                    total += inner;
                    along += inner * n[j];
                }
                let (total, along) = (total / d as f32, along / d as f32);
                for (to, n) in to.iter_mut().zip(n) {
                    *to = scales[i] * (*to - total - n * along);
                }
            }
            Ok((Some(tensor(to_x, x)?), Some(tensor(to_mod, modulation)?)))
        },
    )
}

/// x + gate·y, the gate being part `part` of `modulation` (b, k·d). x and y (b, t, d).
pub fn gated_add(x: &Tensor, modulation: &Tensor, part: usize, y: &Tensor) -> Result<Tensor> {
    let (b, t, d) = x.dims3()?;
    let (mut out, mods, ys) = (values(x)?, values(modulation)?, values(y)?);
    let wide = mods.len() / b;
    for (i, (row, y)) in out.chunks_exact_mut(d).zip(ys.chunks_exact(d)).enumerate() {
        let at = (i / t) * wide + part * d;
        for ((x, y), gate) in row.iter_mut().zip(y).zip(&mods[at..at + d]) {
            *x += gate * y;
        }
    }
    attach3(
        x,
        modulation,
        y,
        &tensor(out, x)?,
        move |_, modulation, y, _, g| {
            let (mut to_y, mods, ys) = (values(g)?, values(modulation)?, values(y)?);
            let mut to_mod = vec![0f32; mods.len()];
            for (i, (row, y)) in to_y.chunks_exact_mut(d).zip(ys.chunks_exact(d)).enumerate() {
                let at = (i / t) * wide + part * d;
                let pairs = to_mod[at..at + d].iter_mut().zip(&mods[at..at + d]);
                for ((g, y), (to, gate)) in row.iter_mut().zip(y).zip(pairs) {
                    *to += *g * y;
                    *g *= gate;
                }
            }
            Ok((
                Some(g.clone()),
                Some(tensor(to_mod, modulation)?),
                Some(tensor(to_y, y)?),
            ))
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Var;
    use simpatico_schema::random::Philox;

    fn random(shape: &[usize], seed: u64) -> Var {
        let n = shape.iter().product();
        let values = Philox::new(seed, 0).normals(n);
        Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu).unwrap()).unwrap()
    }

    fn far(a: &Tensor, b: &Tensor) -> f32 {
        let d = (a - b).unwrap().abs().unwrap().flatten_all().unwrap();
        d.max(0).unwrap().to_scalar().unwrap()
    }

    fn same(ours: &Tensor, theirs: &Tensor, vars: &[&Var]) {
        assert!(far(ours, theirs) < 2e-5);
        let weigh = |y: &Tensor| y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let (a, b) = (weigh(ours), weigh(theirs));
        for var in vars {
            assert!(far(a.get(var).unwrap(), b.get(var).unwrap()) < 5e-4);
        }
    }

    #[test]
    fn each_equals_its_parts_and_their_gradients() {
        let (x, y, m) = (
            random(&[2, 3, 8], 1),
            random(&[2, 3, 8], 2),
            random(&[2, 24], 3),
        );
        let part = |i: usize| m.narrow(1, i * 8, 8).unwrap().unsqueeze(1).unwrap();
        same(&gelu_tanh(&x).unwrap(), &x.gelu().unwrap(), &[&x]);
        let bias = random(&[8], 4);
        same(
            &add_bias(&x, &bias).unwrap(),
            &x.broadcast_add(&bias).unwrap(),
            &[&x, &bias],
        );
        let mean = x.mean_keepdim(2).unwrap();
        let centered = x.broadcast_sub(&mean).unwrap();
        let spread = (centered.sqr().unwrap().mean_keepdim(2).unwrap() + 1e-6).unwrap();
        let normed = centered.broadcast_div(&spread.sqrt().unwrap()).unwrap();
        let plain = normed.broadcast_mul(&(part(2) + 1.0).unwrap()).unwrap();
        let plain = plain.broadcast_add(&part(1)).unwrap();
        same(&modulated_norm(&x, &m, 1).unwrap(), &plain, &[&x, &m]);
        let plain = (x.as_tensor() + y.broadcast_mul(&part(2)).unwrap()).unwrap();
        same(&gated_add(&x, &m, 2, &y).unwrap(), &plain, &[&x, &y, &m]);
    }
}
