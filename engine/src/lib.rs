//! The learned half of Simpatico: taste into words, words into pictures.

pub mod bundle;
pub mod canny;
pub mod chat;
pub mod dino;
pub mod edit;
pub mod engine;
pub mod error;
pub mod eval_images;
pub mod eval_links;
pub mod eval_prompts;
pub mod flux;
pub mod generate;
pub mod gguf;
pub mod grammar;
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
pub mod soft_prompt;
pub mod synth;
pub mod text_vectors;
pub mod tokenizer;
pub mod train_flux;
pub mod train_policy;
pub mod vocabulary;
pub mod weights;

pub use error::{Error, Result};
