//! Matrix products as cuBLAS is asked for them (column by column), and nothing of curand but that
//! it is there: candle makes a generator for each device, ours are on the CPU.

use crate::{CARD, Card, Code, SUCCESS};
use gemm::Parallelism;
use half::{bf16, f16};
use std::ffi::{c_int, c_longlong, c_ulonglong, c_void};

const INVALID_VALUE: Code = 7;
const EXECUTION_FAILED: Code = 13;
const NOT_SUPPORTED: Code = 15;

/// A number of `cudaDataType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    F32,
    F64,
    F16,
    Bf16,
}

impl Kind {
    fn of(number: c_int) -> Option<Self> {
        Some(match number {
            0 => Self::F32,
            1 => Self::F64,
            2 => Self::F16,
            14 => Self::Bf16,
            _ => return None,
        })
    }

    fn bytes(self) -> usize {
        match self {
            Self::F64 => 8,
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// A matrix on the card, and those behind it.
#[derive(Clone, Copy, Debug)]
struct Matrix {
    at: u64,
    kind: Kind,
    rows: usize,
    columns: usize,
    /// From a column to the next, and from a matrix to the next.
    leading: usize,
    stride: usize,
}

impl Matrix {
    /// From its first number to its last.
    fn span(&self) -> usize {
        match self.rows * self.columns {
            0 => 0,
            _ => (self.columns - 1) * self.leading + self.rows,
        }
    }

    fn wide(&self, batch: usize) -> Vec<f32> {
        let from = self.at + (batch * self.stride * self.kind.bytes()) as u64;
        let count = self.span();
        // SAFETY: `product` has looked up that all of it is in an allocation, which lives as long
        // as the card's lock is held.
        unsafe {
            match self.kind {
                Kind::F32 => std::slice::from_raw_parts(from as *const f32, count).to_vec(),
                Kind::F16 => std::slice::from_raw_parts(from as *const f16, count)
                    .iter()
                    .map(|v| v.to_f32())
                    .collect(),
                Kind::Bf16 => std::slice::from_raw_parts(from as *const bf16, count)
                    .iter()
                    .map(|v| v.to_f32())
                    .collect(),
                Kind::F64 => Vec::new(),
            }
        }
    }
}

/// `c = alpha a b + beta c`, summed in f32 (f64 for f64) and rounded once.
fn product(
    card: &mut Card,
    m: usize,
    n: usize,
    k: usize,
    of: [(Matrix, bool); 3],
    batch: usize,
    scale: [f64; 2],
) -> Code {
    let [(a, a_turned), (b, b_turned), (c, _)] = of;
    for (matrix, name) in [(&a, "a"), (&b, "b"), (&c, "c")] {
        let last = batch.saturating_sub(1) * matrix.stride + matrix.span();
        let wanted = last * matrix.kind.bytes();
        if !card.memory.blocks.hold(matrix.at, wanted) {
            eprintln!(
                "emulated card: a product of {m} by {n} over {k}, {batch} times, reaches past {name}'s allocation: \
                 {wanted} bytes at {:#x}, {}",
                matrix.at,
                card.memory.blocks.around(matrix.at)
            );
            card.failed = Some(crate::ILLEGAL_ADDRESS);
            return EXECUTION_FAILED;
        }
        if matrix.leading < matrix.rows.max(1) {
            return INVALID_VALUE;
        }
    }
    card.counts.products += 1;
    card.counts.flop += 2 * (m * n * k * batch) as u64;
    // Strides of a number to the next in its row and its column.
    let strides = |matrix: &Matrix, turned: bool| match turned {
        false => (1, matrix.leading as isize),
        true => (matrix.leading as isize, 1),
    };
    let (a_rows, a_columns) = strides(&a, a_turned);
    let (b_rows, b_columns) = strides(&b, b_turned);
    let threads = match 2 * m * n * k {
        0..1_000_000 => Parallelism::None,
        _ => Parallelism::Rayon(0),
    };
    let [alpha, beta] = scale;
    for i in 0..batch {
        let to = c.at + (i * c.stride * c.kind.bytes()) as u64;
        if c.kind == Kind::F64 {
            let place =
                |matrix: &Matrix| (matrix.at + (i * matrix.stride * 8) as u64) as *const f64;
            // SAFETY: all three lie in live allocations, as was looked up above.
            unsafe {
                gemm::gemm(
                    m,
                    n,
                    k,
                    to as *mut f64,
                    c.leading as isize,
                    1,
                    beta != 0.0,
                    place(&a),
                    a_columns,
                    a_rows,
                    place(&b),
                    b_columns,
                    b_rows,
                    beta,
                    alpha,
                    false,
                    false,
                    false,
                    threads,
                );
            }
            continue;
        }
        let (left, right) = (a.wide(i), b.wide(i));
        let mut sums = vec![0f32; m * n];
        // SAFETY: `left` and `right` hold what their strides span, `sums` m numbers a column.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                sums.as_mut_ptr(),
                m as isize,
                1,
                false,
                left.as_ptr(),
                a_columns,
                a_rows,
                right.as_ptr(),
                b_columns,
                b_rows,
                0.0,
                alpha as f32,
                false,
                false,
                false,
                threads,
            );
        }
        for column in 0..n {
            for row in 0..m {
                let at = column * c.leading + row;
                let sum = sums[column * m + row];
                // SAFETY: inside c, looked up above; a number of its kind.
                unsafe {
                    let old = |v: f32| if beta == 0.0 { 0.0 } else { beta as f32 * v };
                    match c.kind {
                        Kind::F16 => {
                            let place = (to as *mut f16).add(at);
                            place.write(f16::from_f32(sum + old((*place).to_f32())));
                        }
                        Kind::Bf16 => {
                            let place = (to as *mut bf16).add(at);
                            place.write(bf16::from_f32(sum + old((*place).to_f32())));
                        }
                        _ => {
                            let place = (to as *mut f32).add(at);
                            place.write(sum + old(*place));
                        }
                    }
                }
            }
        }
    }
    SUCCESS
}

/// A factor as it is given: in f64 for f64, in f16 where that is computed in, else in f32.
///
/// # Safety
/// It points to one.
unsafe fn factor(at: *const c_void, compute: c_int) -> f64 {
    // SAFETY: the caller's promise.
    unsafe {
        match compute {
            64 | 65 => (*at.cast::<f16>()).to_f64(),
            70 | 71 => *at.cast::<f64>(),
            _ => f64::from(*at.cast::<f32>()),
        }
    }
}

/// Matrix products, one after another in memory.
///
/// # Safety
/// As cuBLAS says; the matrices are looked up before they are touched.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasGemmStridedBatchedEx(
    _handle: *mut c_void,
    a_op: c_int,
    b_op: c_int,
    m: c_int,
    n: c_int,
    k: c_int,
    alpha: *const c_void,
    a: *const c_void,
    a_type: c_int,
    lda: c_int,
    a_stride: c_longlong,
    b: *const c_void,
    b_type: c_int,
    ldb: c_int,
    b_stride: c_longlong,
    beta: *const c_void,
    c: *mut c_void,
    c_type: c_int,
    ldc: c_int,
    c_stride: c_longlong,
    batch: c_int,
    compute: c_int,
    _algorithm: c_int,
) -> Code {
    let mut card = CARD.lock().unwrap_or_else(|e| e.into_inner());
    if card.failed.is_some() {
        return EXECUTION_FAILED;
    }
    let (Some(a_kind), Some(b_kind), Some(c_kind)) =
        (Kind::of(a_type), Kind::of(b_type), Kind::of(c_type))
    else {
        return NOT_SUPPORTED;
    };
    if [m, n, k, batch, lda, ldb, ldc].iter().any(|v| *v < 0) {
        return INVALID_VALUE;
    }
    let [m, n, k, batch] = [m, n, k, batch].map(|v| v as usize);
    // SAFETY: factors come from the host, as the caller promises.
    let scale = unsafe { [factor(alpha, compute), factor(beta, compute)] };
    let matrix = |at: *const c_void, kind, shape: (usize, usize), leading, stride| Matrix {
        at: at as u64,
        kind,
        rows: shape.0,
        columns: shape.1,
        leading: leading as usize,
        stride: stride as usize,
    };
    let turn = |op, shape: (usize, usize)| if op == 0 { shape } else { (shape.1, shape.0) };
    let of = [
        (
            matrix(a, a_kind, turn(a_op, (m, k)), lda, a_stride),
            a_op != 0,
        ),
        (
            matrix(b, b_kind, turn(b_op, (k, n)), ldb, b_stride),
            b_op != 0,
        ),
        (matrix(c, c_kind, (m, n), ldc, c_stride), false),
    ];
    product(&mut card, m, n, k, of, batch, scale)
}

/// The same in f64.
///
/// # Safety
/// As [`cublasGemmStridedBatchedEx`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasDgemmStridedBatched(
    handle: *mut c_void,
    a_op: c_int,
    b_op: c_int,
    m: c_int,
    n: c_int,
    k: c_int,
    alpha: *const f64,
    a: *const f64,
    lda: c_int,
    a_stride: c_longlong,
    b: *const f64,
    ldb: c_int,
    b_stride: c_longlong,
    beta: *const f64,
    c: *mut f64,
    ldc: c_int,
    c_stride: c_longlong,
    batch: c_int,
) -> Code {
    // SAFETY: the caller's promise, passed on.
    unsafe {
        cublasGemmStridedBatchedEx(
            handle,
            a_op,
            b_op,
            m,
            n,
            k,
            alpha.cast(),
            a.cast(),
            1,
            lda,
            a_stride,
            b.cast(),
            1,
            ldb,
            b_stride,
            beta.cast(),
            c.cast(),
            1,
            ldc,
            c_stride,
            batch,
            70,
            0,
        )
    }
}

macro_rules! agree {
    ($($name:ident($($argument:ident: $of:ty),*)),* $(,)?) => {$(
        /// There is nothing to do.
        #[unsafe(no_mangle)]
        pub extern "C" fn $name($($argument: $of),*) -> Code {
            SUCCESS
        }
    )*};
}
agree!(
    cublasDestroy_v2(_handle: *mut c_void),
    cublasSetStream_v2(_handle: *mut c_void, _stream: *mut c_void),
    curandDestroyGenerator(_generator: *mut c_void),
    curandSetPseudoRandomGeneratorSeed(_generator: *mut c_void, _seed: c_ulonglong),
    curandSetStream(_generator: *mut c_void, _stream: *mut c_void),
);

/// A handle.
///
/// # Safety
/// `handle` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasCreate_v2(handle: *mut *mut c_void) -> Code {
    // SAFETY: the caller's promise.
    unsafe { *handle = crate::TOKEN };
    SUCCESS
}

/// A generator of random numbers, which nobody asks for any.
///
/// # Safety
/// `generator` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn curandCreateGenerator(generator: *mut *mut c_void, _kind: c_int) -> Code {
    // SAFETY: the caller's promise.
    unsafe { *generator = crate::TOKEN };
    SUCCESS
}
