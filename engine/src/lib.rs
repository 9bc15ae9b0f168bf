//! The learned half of Simpatico: taste into words, words into pictures.

pub mod attributes;
pub mod bundle;
pub mod canny;
#[cfg(feature = "cuda")]
mod card;
pub mod chat;
pub mod clip;
pub mod conv;
#[cfg(feature = "cuda")]
mod cuda_learn;
pub mod dino;
pub mod edit;
pub mod engine;
pub mod error;
pub mod eval_images;
pub mod eval_links;
pub mod eval_neighbors;
pub mod eval_prompts;
pub mod flux;
pub mod fused;
pub mod generate;
pub mod gguf;
pub mod grammar;
mod host;
#[cfg(test)]
#[path = "kernels/tests.rs"]
mod kernel_tests;
#[cfg(feature = "cuda")]
mod kernels;
pub mod lm;
pub mod lora;
pub mod lpips;
pub mod nn;
pub mod optim;
pub mod params;
pub mod picture;
pub mod plot;
pub mod policy;
pub mod provenance;
pub mod render;
pub mod sage_train;
pub mod sampler;
mod slot;
pub mod soft_prompt;
pub mod synth;
pub mod table;
pub mod text_vectors;
pub mod tokenizer;
pub mod train_flux;
pub mod train_policy;
pub mod vocabulary;
pub mod weights;
pub mod wishes;

pub use candle_core::{DType, Device};
pub use engine::{Engine, device, use_own_cores};
pub use error::{Error, Result};
