//! What instructions without memory or control flow compute, for the 32 lanes of a warp at once.
//!
//! A register holds 64 bits a lane; narrower values stand in the lowest bits, the rest zero (PTX
//! ISA 9.0, sections 5 and 9).

use half::{bf16, f16};

/// A register of a warp: one value a lane.
pub(crate) type Lanes = [u64; 32];

/// An instruction of up to three operands, computed for the lanes of a mask.
pub(crate) type Alu = fn(u32, &Lanes, &Lanes, &Lanes, &mut Lanes);

#[inline(always)]
fn each(
    mask: u32,
    a: &Lanes,
    b: &Lanes,
    c: &Lanes,
    d: &mut Lanes,
    f: impl Fn(u64, u64, u64) -> u64,
) {
    if mask == u32::MAX {
        for i in 0..32 {
            d[i] = f(a[i], b[i], c[i]);
        }
    } else {
        for i in (0..32).filter(|i| mask >> i & 1 == 1) {
            d[i] = f(a[i], b[i], c[i]);
        }
    }
}

macro_rules! alu {
    (|$a:ident, $b:ident, $c:ident| $e:expr) => {
        (|m: u32, a: &Lanes, b: &Lanes, c: &Lanes, d: &mut Lanes| {
            each(m, a, b, c, d, |$a: u64, $b: u64, $c: u64| $e)
        }) as Alu
    };
}

/// A type of PTX that can be converted from and to others.
trait Scalar {
    const FLOAT: bool;
    fn int(bits: u64) -> i128;
    fn float(bits: u64) -> f64;
    /// The lowest bits of a whole number.
    fn of_int(value: i128) -> u64;
    /// The nearest number; for a whole type the nearest that it has.
    fn of_float(value: f64) -> u64;
}

macro_rules! whole {
    ($($t:ty, $u:ty);*) => {$(
        impl Scalar for $t {
            const FLOAT: bool = false;
            #[inline(always)]
            fn int(bits: u64) -> i128 { bits as $t as i128 }
            #[inline(always)]
            fn float(bits: u64) -> f64 { bits as $t as f64 }
            #[inline(always)]
            fn of_int(value: i128) -> u64 { value as $u as u64 }
            #[inline(always)]
            fn of_float(value: f64) -> u64 { value as $t as $u as u64 }
        }
    )*};
}
whole!(u8, u8; i8, u8; u16, u16; i16, u16; u32, u32; i32, u32; u64, u64; i64, u64);

macro_rules! fraction {
    ($($t:ty, $u:ty, |$value:ident| $to:expr, |$whole:ident| $of:expr);*) => {$(
        impl Scalar for $t {
            const FLOAT: bool = true;
            #[inline(always)]
            fn int(bits: u64) -> i128 { Self::float(bits) as i128 }
            #[inline(always)]
            fn float(bits: u64) -> f64 { f64::from(<$t>::from_bits(bits as $u)) }
            #[inline(always)]
            fn of_int($whole: i128) -> u64 { ($of).to_bits() as u64 }
            #[inline(always)]
            fn of_float($value: f64) -> u64 { ($to).to_bits() as u64 }
        }
    )*};
}
// A whole number of 64 bits may not be a double: to f32 it goes in one rounding. The halves are
// converted from 32 bits at most.
fraction!(
    f16, u16, |v| f16::from_f64(v), |v| f16::from_f64(v as f64);
    bf16, u16, |v| bf16::from_f64(v), |v| bf16::from_f64(v as f64);
    f32, u32, |v| v as f32, |v| v as f32;
    f64, u64, |v| v, |v| v as f64
);

fn as_is<D: Scalar, S: Scalar>() -> Alu {
    |m, a, b, c, d| {
        each(m, a, b, c, d, |a, _, _| match (D::FLOAT, S::FLOAT) {
            (_, false) => D::of_int(S::int(a)),
            (_, true) => D::of_float(S::float(a)),
        })
    }
}

/// A float to the nearest whole number, in one of PTX's four directions.
fn whole_number<D: Scalar, S: Scalar>(direction: &str) -> Option<Alu> {
    Some(match direction {
        "rni" => |m, a, b, c, d| {
            each(m, a, b, c, d, |a, _, _| {
                D::of_float(S::float(a).round_ties_even())
            })
        },
        "rzi" => |m, a, b, c, d| each(m, a, b, c, d, |a, _, _| D::of_float(S::float(a).trunc())),
        "rmi" => |m, a, b, c, d| each(m, a, b, c, d, |a, _, _| D::of_float(S::float(a).floor())),
        "rpi" => |m, a, b, c, d| each(m, a, b, c, d, |a, _, _| D::of_float(S::float(a).ceil())),
        _ => return None,
    })
}

macro_rules! source {
    ($name:expr, $f:ident, $d:ty $(, $more:expr)*) => {
        match $name {
            "u8" => $f::<$d, u8>($($more)*),
            "s8" => $f::<$d, i8>($($more)*),
            "u16" => $f::<$d, u16>($($more)*),
            "s16" => $f::<$d, i16>($($more)*),
            "u32" => $f::<$d, u32>($($more)*),
            "s32" => $f::<$d, i32>($($more)*),
            "u64" => $f::<$d, u64>($($more)*),
            "s64" => $f::<$d, i64>($($more)*),
            "f16" => $f::<$d, f16>($($more)*),
            "bf16" => $f::<$d, bf16>($($more)*),
            "f32" => $f::<$d, f32>($($more)*),
            "f64" => $f::<$d, f64>($($more)*),
            _ => return None,
        }
    };
}
macro_rules! convert {
    ($to:expr, $from:expr, $f:ident $(, $more:expr)*) => {
        match $to {
            "u8" => source!($from, $f, u8 $(, $more)*),
            "s8" => source!($from, $f, i8 $(, $more)*),
            "u16" => source!($from, $f, u16 $(, $more)*),
            "s16" => source!($from, $f, i16 $(, $more)*),
            "u32" => source!($from, $f, u32 $(, $more)*),
            "s32" => source!($from, $f, i32 $(, $more)*),
            "u64" => source!($from, $f, u64 $(, $more)*),
            "s64" => source!($from, $f, i64 $(, $more)*),
            "f16" => source!($from, $f, f16 $(, $more)*),
            "bf16" => source!($from, $f, bf16 $(, $more)*),
            "f32" => source!($from, $f, f32 $(, $more)*),
            "f64" => source!($from, $f, f64 $(, $more)*),
            _ => return None,
        }
    };
}

/// `cvt.…`: the parts after the first.
fn cvt(parts: &[&str]) -> Option<Alu> {
    let parts: Vec<&str> = parts.iter().copied().filter(|p| *p != "ftz").collect();
    Some(match parts.as_slice() {
        // By far the most frequent.
        ["f32", "bf16"] => alu!(|a, _b, _c| (a & 0xffff) << 16),
        ["f32", "f16"] => alu!(|a, _b, _c| f16::from_bits(a as u16).to_f32().to_bits() as u64),
        ["rn", "bf16", "f32"] => alu!(|a, _b, _c| bf16::from_f32(single(a)).to_bits() as u64),
        ["rn", "f16", "f32"] => alu!(|a, _b, _c| f16::from_f32(single(a)).to_bits() as u64),
        ["rn", "bf16x2", "f32"] => alu!(|a, b, _c| {
            let half = |v| bf16::from_f32(single(v)).to_bits() as u64;
            half(a) << 16 | half(b)
        }),
        ["rn", "f16x2", "f32"] => alu!(|a, b, _c| {
            let half = |v| f16::from_f32(single(v)).to_bits() as u64;
            half(a) << 16 | half(b)
        }),
        ["sat", "f32", "f32"] => alu!(|a, _b, _c| match single(a) {
            // What is no number becomes 0.
            v if v > 0.0 => bits(v.min(1.0)),
            _ => 0,
        }),
        ["sat", "f64", "f64"] => alu!(|a, _b, _c| match double(a) {
            v if v > 0.0 => v.min(1.0).to_bits(),
            _ => 0,
        }),
        [way @ ("rni" | "rzi" | "rmi" | "rpi"), to, from] => {
            return convert!(*to, *from, whole_number, way);
        }
        ["rn", to, from] | [to, from] => convert!(*to, *from, as_is),
        _ => return None,
    })
}

#[inline(always)]
fn single(bits: u64) -> f32 {
    f32::from_bits(bits as u32)
}
#[inline(always)]
fn double(bits: u64) -> f64 {
    f64::from_bits(bits)
}
#[inline(always)]
fn bits(value: f32) -> u64 {
    u64::from(value.to_bits())
}

/// The sum of two doubles as a float rounded down or towards zero, from the sum rounded to the
/// nearest double and what that left over.
#[inline(always)]
fn directed(p: f64, c: f64, to_zero: bool) -> f32 {
    let sum = p + c;
    let back = sum - p;
    let rest = (p - (sum - back)) + (c - back);
    let near = sum as f32;
    if !near.is_finite() || (f64::from(near) == sum && rest == 0.0) {
        return near;
    }
    let above = f64::from(near) > sum || (f64::from(near) == sum && rest < 0.0);
    match (to_zero && sum < 0.0, above) {
        (false, true) => near.next_down(),
        (true, false) => near.next_up(),
        _ => near,
    }
}

macro_rules! ints {
    ($name:ident, $t:ty, $u:ty, $wide:ty, $uwide:ty) => {
        fn $name(base: &str, mods: &[&str]) -> Option<Alu> {
            const BITS: u32 = <$t>::BITS;
            // What a division by zero gives is not defined; cards give ones.
            Some(match (base, mods) {
                ("add", []) => alu!(|a, b, _c| (a as $u).wrapping_add(b as $u) as u64),
                ("sub", []) => alu!(|a, b, _c| (a as $u).wrapping_sub(b as $u) as u64),
                ("mul", ["lo"]) => alu!(|a, b, _c| (a as $u).wrapping_mul(b as $u) as u64),
                ("mul", ["hi"]) => alu!(|a, b, _c| {
                    (((a as $t as $wide).wrapping_mul(b as $t as $wide)) >> BITS) as $u as u64
                }),
                ("mul", ["wide"]) => alu!(|a, b, _c| {
                    (a as $t as $wide).wrapping_mul(b as $t as $wide) as $uwide as u64
                }),
                ("mad", ["lo"]) => {
                    alu!(|a, b, c| { (a as $u).wrapping_mul(b as $u).wrapping_add(c as $u) as u64 })
                }
                ("mad", ["hi"]) => alu!(|a, b, c| {
                    let high = ((a as $t as $wide).wrapping_mul(b as $t as $wide)) >> BITS;
                    (high as $u).wrapping_add(c as $u) as u64
                }),
                ("mad", ["wide"]) => alu!(|a, b, c| {
                    let product = (a as $t as $wide).wrapping_mul(b as $t as $wide);
                    product.wrapping_add(c as $wide) as $uwide as u64
                }),
                ("div", []) => alu!(|a, b, _c| match b as $t {
                    0 => <$u>::MAX as u64,
                    b => (a as $t).wrapping_div(b) as $u as u64,
                }),
                ("rem", []) => alu!(|a, b, _c| match b as $t {
                    0 => a,
                    b => (a as $t).wrapping_rem(b) as $u as u64,
                }),
                ("min", []) => alu!(|a, b, _c| (a as $t).min(b as $t) as $u as u64),
                ("max", []) => alu!(|a, b, _c| (a as $t).max(b as $t) as $u as u64),
                ("neg", []) => alu!(|a, _b, _c| (a as $u).wrapping_neg() as u64),
                ("abs", []) => alu!(|a, _b, _c| {
                    let a = a as $t as $wide;
                    (if a < 0 as $wide {
                        (0 as $wide).wrapping_sub(a)
                    } else {
                        a
                    }) as $u as u64
                }),
                ("and", []) => alu!(|a, b, _c| a & b),
                ("or", []) => alu!(|a, b, _c| a | b),
                ("xor", []) => alu!(|a, b, _c| a ^ b),
                ("not", []) => alu!(|a, _b, _c| !(a as $u) as u64),
                ("shl", []) => alu!(|a, b, _c| match b as u32 {
                    by if by < BITS => ((a as $u) << by) as u64,
                    _ => 0,
                }),
                ("shr", []) => alu!(|a, b, _c| {
                    // All of a negative number's bits that are shifted in are ones.
                    let by = (b as u32).min(BITS);
                    match by == BITS {
                        true => (((a as $t) >> (BITS - 1)) >> 1) as $u as u64,
                        false => ((a as $t) >> by) as $u as u64,
                    }
                }),
                ("setp", ["eq"]) => alu!(|a, b, _c| u64::from(a as $t == b as $t)),
                ("setp", ["ne"]) => alu!(|a, b, _c| u64::from(a as $t != b as $t)),
                ("setp", ["lt" | "lo"]) => alu!(|a, b, _c| u64::from((a as $t) < b as $t)),
                ("setp", ["le" | "ls"]) => alu!(|a, b, _c| u64::from(a as $t <= b as $t)),
                ("setp", ["gt" | "hi"]) => alu!(|a, b, _c| u64::from(a as $t > b as $t)),
                ("setp", ["ge" | "hs"]) => alu!(|a, b, _c| u64::from(a as $t >= b as $t)),
                ("selp", []) => alu!(|a, b, c| if c != 0 { a } else { b }),
                ("mov", []) => alu!(|a, _b, _c| a as $u as u64),
                ("popc", []) => alu!(|a, _b, _c| u64::from((a as $u).count_ones())),
                ("clz", []) => alu!(|a, _b, _c| u64::from((a as $u).leading_zeros())),
                ("brev", []) => alu!(|a, _b, _c| (a as $u).reverse_bits() as u64),
                // With the carry of the instruction before as third operand.
                ("addc", []) => {
                    alu!(|a, b, c| { (a as $u).wrapping_add(b as $u).wrapping_add(c as $u) as u64 })
                }
                ("addc", ["carry"]) => alu!(|a, b, c| {
                    (((a as $u as u128) + (b as $u as u128) + u128::from(c)) >> BITS) as u64
                }),
                ("subc", []) => {
                    alu!(|a, b, c| { (a as $u).wrapping_sub(b as $u).wrapping_sub(c as $u) as u64 })
                }
                ("subc", ["carry"]) => alu!(|a, b, c| {
                    u64::from((a as $u as u128) < (b as $u as u128) + u128::from(c))
                }),
                _ => return None,
            })
        }
    };
}
ints!(int_u16, u16, u16, u32, u32);
ints!(int_s16, i16, u16, i32, u32);
ints!(int_u32, u32, u32, u64, u64);
ints!(int_s32, i32, u32, i64, u64);
ints!(int_u64, u64, u64, u128, u128);
ints!(int_s64, i64, u64, i128, u128);

macro_rules! compare {
    ($mods:expr, |$x:ident| $of:expr) => {{
        macro_rules! rule {
            (|$p:ident, $q:ident| $e:expr) => {
                alu!(|a, b, _c| {
                    let ($p, $q) = (
                        {
                            let $x = a;
                            $of
                        },
                        {
                            let $x = b;
                            $of
                        },
                    );
                    u64::from($e)
                })
            };
        }
        // With a u at its end a comparison also holds where one side is no number.
        match $mods {
            ["eq"] => rule!(|p, q| p == q),
            ["ne"] => rule!(|p, q| p.partial_cmp(&q).is_some_and(|o| o.is_ne())),
            ["lt"] => rule!(|p, q| p < q),
            ["le"] => rule!(|p, q| p <= q),
            ["gt"] => rule!(|p, q| p > q),
            ["ge"] => rule!(|p, q| p >= q),
            ["equ"] => rule!(|p, q| p.partial_cmp(&q).is_none_or(|o| o.is_eq())),
            ["neu"] => rule!(|p, q| p != q),
            ["ltu"] => rule!(|p, q| !(p >= q)),
            ["leu"] => rule!(|p, q| !(p > q)),
            ["gtu"] => rule!(|p, q| !(p <= q)),
            ["geu"] => rule!(|p, q| !(p < q)),
            ["num"] => rule!(|p, q| !p.is_nan() && !q.is_nan()),
            ["nan"] => rule!(|p, q| p.is_nan() || q.is_nan()),
            _ => return None,
        }
    }};
}

macro_rules! floats {
    ($name:ident, $t:ty, $u:ty) => {
        #[allow(clippy::neg_cmp_op_on_partial_ord)]
        fn $name(base: &str, mods: &[&str]) -> Option<Alu> {
            #[inline(always)]
            fn of(bits: u64) -> $t {
                <$t>::from_bits(bits as $u)
            }
            #[inline(always)]
            fn to(value: $t) -> u64 {
                value.to_bits() as u64
            }
            const SIGN: u64 = 1 << (<$u>::BITS - 1);
            // Rounding to the nearest is what nothing said means; `approx` is computed exactly.
            let plain: Vec<&str> = mods
                .iter()
                .copied()
                .filter(|m| !matches!(*m, "rn" | "ftz" | "approx" | "full"))
                .collect();
            Some(match (base, plain.as_slice()) {
                ("add", []) => alu!(|a, b, _c| to(of(a) + of(b))),
                ("sub", []) => alu!(|a, b, _c| to(of(a) - of(b))),
                ("mul", []) => alu!(|a, b, _c| to(of(a) * of(b))),
                ("div", []) => alu!(|a, b, _c| to(of(a) / of(b))),
                ("fma" | "mad", []) => alu!(|a, b, c| to(of(a).mul_add(of(b), of(c)))),
                ("min", []) => alu!(|a, b, _c| to(of(a).min(of(b)))),
                ("max", []) => alu!(|a, b, _c| to(of(a).max(of(b)))),
                ("neg", []) => alu!(|a, _b, _c| a ^ SIGN),
                ("abs", []) => alu!(|a, _b, _c| a & (SIGN - 1)),
                ("copysign", []) => alu!(|a, b, _c| a & SIGN | b & (SIGN - 1)),
                ("sqrt", []) => alu!(|a, _b, _c| to(of(a).sqrt())),
                ("rsqrt", []) => alu!(|a, _b, _c| to(1.0 / of(a).sqrt())),
                ("rcp", []) => alu!(|a, _b, _c| to(1.0 / of(a))),
                ("ex2", []) => alu!(|a, _b, _c| to(of(a).exp2())),
                ("lg2", []) => alu!(|a, _b, _c| to(of(a).log2())),
                ("sin", []) => alu!(|a, _b, _c| to(of(a).sin())),
                ("cos", []) => alu!(|a, _b, _c| to(of(a).cos())),
                ("tanh", []) => alu!(|a, _b, _c| to(of(a).tanh())),
                ("selp", []) => alu!(|a, b, c| if c != 0 { a } else { b }),
                ("mov", []) => alu!(|a, _b, _c| a),
                ("setp", mods) => compare!(mods, |x| of(x)),
                _ => return None,
            })
        }
    };
}
floats!(float_f32, f32, u32);
floats!(float_f64, f64, u64);

macro_rules! halves {
    ($name:ident, $t:ty) => {
        #[allow(clippy::neg_cmp_op_on_partial_ord)]
        fn $name(base: &str, mods: &[&str]) -> Option<Alu> {
            // Sums and products of two halves are exact in a double, or near enough that one
            // rounding remains.
            #[inline(always)]
            fn of(bits: u64) -> f64 {
                <$t>::from_bits(bits as u16).to_f64()
            }
            #[inline(always)]
            fn to(value: f64) -> u64 {
                <$t>::from_f64(value).to_bits() as u64
            }
            #[inline(always)]
            fn greatest(a: f64, b: f64) -> f64 {
                if a.is_nan() || b.is_nan() {
                    f64::NAN
                } else {
                    a.max(b)
                }
            }
            let plain: Vec<&str> = mods
                .iter()
                .copied()
                .filter(|m| !matches!(*m, "rn" | "ftz" | "approx"))
                .collect();
            Some(match (base, plain.as_slice()) {
                ("add", []) => alu!(|a, b, _c| to(of(a) + of(b))),
                ("sub", []) => alu!(|a, b, _c| to(of(a) - of(b))),
                ("mul", []) => alu!(|a, b, _c| to(of(a) * of(b))),
                ("fma", []) => alu!(|a, b, c| to(of(a) * of(b) + of(c))),
                ("min", []) => alu!(|a, b, _c| to(of(a).min(of(b)))),
                ("max", []) => alu!(|a, b, _c| to(of(a).max(of(b)))),
                ("max", ["NaN"]) => alu!(|a, b, _c| to(greatest(of(a), of(b)))),
                ("min", ["NaN"]) => alu!(|a, b, _c| to(-greatest(-of(a), -of(b)))),
                ("neg", []) => alu!(|a, _b, _c| a ^ 0x8000),
                ("abs", []) => alu!(|a, _b, _c| a & 0x7fff),
                ("ex2", []) => alu!(|a, _b, _c| to(of(a).exp2())),
                ("tanh", []) => alu!(|a, _b, _c| to(of(a).tanh())),
                ("set", ["eq"]) => alu!(|a, b, _c| to(f64::from(u8::from(of(a) == of(b))))),
                ("setp", mods) => compare!(mods, |x| of(x)),
                _ => return None,
            })
        }
    };
}
halves!(half_f16, f16);
halves!(half_bf16, bf16);

/// Two halves of 32 bits, each by itself.
fn pairs_bf16(base: &str, mods: &[&str]) -> Option<Alu> {
    fn both(a: u64, b: u64, c: u64, f: impl Fn(f64, f64, f64) -> f64) -> u64 {
        let half = |shift: u32| {
            let of = |v: u64| bf16::from_bits((v >> shift) as u16).to_f64();
            u64::from(bf16::from_f64(f(of(a), of(b), of(c))).to_bits()) << shift
        };
        half(0) | half(16)
    }
    let plain: Vec<&str> = mods.iter().copied().filter(|m| *m != "rn").collect();
    Some(match (base, plain.as_slice()) {
        ("add", []) => alu!(|a, b, c| both(a, b, c, |a, b, _| a + b)),
        ("sub", []) => alu!(|a, b, c| both(a, b, c, |a, b, _| a - b)),
        ("mul", []) => alu!(|a, b, c| both(a, b, c, |a, b, _| a * b)),
        ("fma", []) => alu!(|a, b, c| both(a, b, c, |a, b, c| a * b + c)),
        _ => return None,
    })
}

/// Four bytes of eight, by the selectors in c's nibbles; a selector's high bit repeats the sign.
fn prmt(a: u64, b: u64, c: u64) -> u64 {
    let all = u64::from(a as u32) | u64::from(b as u32) << 32;
    (0..4).fold(0, |out, i| {
        let pick = c >> (4 * i);
        let byte = all >> (8 * (pick & 7)) & 0xff;
        let byte = match pick & 8 {
            0 => byte,
            _ if byte & 0x80 != 0 => 0xff,
            _ => 0,
        };
        out | byte << (8 * i)
    })
}

/// What `opcode` computes, if it is known here; its operands in the order of the text.
pub(crate) fn alu(opcode: &str) -> Option<Alu> {
    let parts: Vec<&str> = opcode.split('.').collect();
    let (base, rest) = parts.split_first()?;
    if *base == "cvt" {
        return cvt(rest);
    }
    let (last, mods) = rest.split_last()?;
    match (*base, mods, *last) {
        ("fma", ["rm"], "f32") => {
            // The product of two floats is a double, exactly.
            return Some(alu!(|a, b, c| bits(directed(
                f64::from(single(a)) * f64::from(single(b)),
                f64::from(single(c)),
                false
            ))));
        }
        ("add", ["rz"], "f32") => {
            return Some(alu!(|a, b, _c| bits(directed(
                f64::from(single(a)),
                f64::from(single(b)),
                true
            ))));
        }
        ("prmt", [], "b32") => return Some(alu!(|a, b, c| prmt(a, b, c))),
        // Truth has one bit.
        ("not", [], "pred") => return Some(alu!(|a, _b, _c| a ^ 1)),
        ("set", [how, "f16"], "f16") => return half_f16("set", &[how]),
        ("set", [how, "bf16"], "bf16") => return half_bf16("set", &[how]),
        _ => {}
    }
    match *last {
        "u16" | "b16" => int_u16(base, mods),
        "s16" => int_s16(base, mods),
        "u32" | "b32" => int_u32(base, mods),
        "s32" => int_s32(base, mods),
        "u64" | "b64" | "pred" => int_u64(base, mods),
        "s64" => int_s64(base, mods),
        "f32" => float_f32(base, mods),
        "f64" => float_f64(base, mods),
        "f16" => half_f16(base, mods),
        "bf16" => half_bf16(base, mods),
        "bf16x2" => pairs_bf16(base, mods),
        _ => None,
    }
}
