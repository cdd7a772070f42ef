//! Llama-family models on candle with the lean cache as their attention
