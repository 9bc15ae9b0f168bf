//! What can go wrong in the engine, and what to do about it.

use std::path::PathBuf;

/// The result of everything in this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A model file that is missing.
    #[error("{}: no such model file; {help}", path.display())]
    MissingModel {
        /// Where it was looked for.
        path: PathBuf,
        /// What to do.
        help: String,
    },
    /// A model file that is damaged or not of the expected kind.
    #[error("{file}: {reason}")]
    BadModel {
        /// The file, or the tensor within it.
        file: String,
        /// What was expected and what was got.
        reason: String,
    },
    /// A picture that cannot be used.
    #[error("{what}: {reason}")]
    BadImage {
        /// Which picture.
        what: String,
        /// What was expected and what was got.
        reason: String,
    },
    /// A request that cannot be carried out as it stands.
    #[error("{0}")]
    BadRequest(String),
    /// A model that does not fit.
    #[error(
        "{stage} needs {need_bytes} bytes of memory on {device}, {free_bytes} are free; {help}"
    )]
    NotEnoughMemory {
        /// What was to be loaded or run.
        stage: String,
        /// The device.
        device: String,
        /// What it takes.
        need_bytes: u64,
        /// What there is.
        free_bytes: u64,
        /// What to do.
        help: String,
    },
    /// A device whose memory was used up in the middle of the work. What the work had taken is given
    /// back: something smaller can follow.
    #[error("{stage} used up the memory of the device; {help}")]
    OutOfMemory {
        /// What was being done.
        stage: String,
        /// What to do.
        help: String,
    },
    /// The caller cancelled the work.
    #[error("cancelled")]
    Cancelled,
    /// A file that could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A tensor operation failed: a bug of ours, or a device that gave up.
    #[error(transparent)]
    Tensor(candle_core::Error),
}

impl From<candle_core::Error> for Error {
    /// Without the stack that candle writes into its messages under RUST_BACKTRACE: a damaged
    /// file is explained in one line.
    fn from(mut error: candle_core::Error) -> Self {
        while let candle_core::Error::WithBacktrace { inner, .. } = error {
            error = *inner;
        }
        match used_up(&error) {
            true => Self::OutOfMemory {
                stage: "a tensor operation".into(),
                help: "ask for less at once, or for a smaller bundle".into(),
            },
            false => Self::Tensor(error),
        }
    }
}

/// Whether a device had no memory left. candle passes its drivers' errors on as they come; these two
/// are CUDA's own and cuBLAS's.
fn used_up(error: &candle_core::Error) -> bool {
    let said = error.to_string();
    ["CUDA_ERROR_OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED"]
        .iter()
        .any(|code| said.contains(code))
}

impl Error {
    /// An I/O error with the file it happened to.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    /// With what was being done and what to do about it, where a device's memory was used up.
    pub(crate) fn during(self, doing: &str, instead: &str) -> Self {
        match self {
            Self::OutOfMemory { .. } => Self::OutOfMemory {
                stage: doing.into(),
                help: instead.into(),
            },
            other => other,
        }
    }

    /// A damaged or unsuitable model file.
    pub fn bad_model(file: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::BadModel {
            file: file.into(),
            reason: reason.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_error_is_told_without_its_stack() {
        let error = candle_core::Error::WithBacktrace {
            inner: Box::new(candle_core::Error::Msg("holds a NaN".into())),
            backtrace: Box::new(std::backtrace::Backtrace::force_capture()),
        };
        assert_eq!(Error::from(error).to_string(), "holds a NaN");
    }

    #[test]
    fn a_full_device_is_named_with_what_was_being_done() {
        let said = "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")";
        let error = Error::from(candle_core::Error::Cuda(said.into()));
        assert!(matches!(error, Error::OutOfMemory { .. }));
        assert_eq!(
            error.during("training", "take fewer").to_string(),
            "training used up the memory of the device; take fewer"
        );
        let other = Error::from(candle_core::Error::Cuda("CUDA_ERROR_NO_DEVICE".into()));
        assert!(matches!(other.during("a", "b"), Error::Tensor(_)));
    }
}
