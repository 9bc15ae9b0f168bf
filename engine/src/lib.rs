//! The learned half of Simpatico: taste into words, words into pictures.

pub mod nn;
