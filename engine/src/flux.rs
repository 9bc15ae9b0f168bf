//! Flux: the rectified-flow transformer that turns noise and words into pictures, with its
//! ControlNet, picture autoencoder, text encoders, weight names and LoRA.
//!
//! Not here: the sampling loop and the ways to edit ([`crate::sampler`]), pictures as files
//! ([`crate::picture`]), training ([`crate::train_flux`]).
//!
//! Every network is one file with a `Config` (presets as functions, and diffusers'
//! `config.json` by serde), `new(&Config, VarBuilder)` and `forward`. In memory the weights
//! have the names of Black Forest Labs' own checkpoints, whose fused matrices are also the
//! fast ones; [`names`] reads other layouts into these. The same code runs FLUX.1-dev and a
//! network of five million parameters, for inference and for training.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use simpatico_engine::flux::{init, names, transformer::{Config, FluxTransformer, Inputs, image_ids, text_ids}};
//!
//! let config = Config::tiny();
//! let weights = init::random(&names::transformer_shapes(&config), 0, &Device::Cpu)?;
//! let flux = FluxTransformer::new(&config, init::builder(&weights, DType::F32, &Device::Cpu))?;
//! let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu);
//! let velocity = flux.forward(&Inputs {
//!     latents: &zeros(&[1, 16, config.in_channels])?,
//!     ids: &image_ids(4, 4, &Device::Cpu)?,
//!     text: &zeros(&[1, 8, config.joint_attention_dim])?,
//!     text_ids: &text_ids(8, &Device::Cpu)?,
//!     pooled: &zeros(&[1, config.pooled_projection_dim])?,
//!     timestep: &Tensor::new(&[1f32], &Device::Cpu)?,
//!     guidance: Some(&Tensor::new(&[3.5f32], &Device::Cpu)?),
//!     residuals: None,
//! })?;
//! assert_eq!(velocity.dims(), [1, 16, config.in_channels]);
//! # Ok::<(), simpatico_engine::Error>(())
//! ```

pub mod controlnet;
mod cpu_blocks;
#[cfg(feature = "cuda")]
pub(crate) mod cuda_blocks;
pub mod detail;
pub mod init;
pub mod lora;
pub mod names;
pub mod t5;
pub mod text;
pub mod transformer;
pub mod vae;

#[cfg(test)]
pub(crate) mod golden_tests;
