//! How far a step has come, and whether a call may come now: the same for every backend.

use crate::{Error, Layer, Ledger, ModelShape, Result, Step, ViewShape};

/// The layers that were appended to in the step under way, and the checks of [`crate::Cache`]'s calls.
#[derive(Clone, Debug)]
pub struct Progress {
    shape: ModelShape,
    appended: Vec<bool>,
}

impl Progress {
    /// Of a cache before its first step.
    #[must_use]
    pub fn new(shape: ModelShape) -> Self {
        Self { shape, appended: vec![false; shape.layers] }
    }

    /// A step was planned.
    pub fn begin(&mut self) {
        self.appended.fill(false);
    }

    /// A layer that was checked has its K and V.
    ///
    /// # Panics
    /// When the index is out of range.
    pub fn mark(&mut self, layer: Layer) {
        self.appended[layer.0] = true;
    }

    /// Every layer has its K and V.
    pub fn mark_all(&mut self) {
        self.appended.fill(true);
    }

    /// Whether `call` on a layer may come now.
    ///
    /// # Errors
    /// [`Error::Order`] outside a step, [`Error::Mismatch`] for a layer that is not there.
    pub fn check_layer(&self, ledger: &Ledger, call: &'static str, layer: Layer) -> Result<()> {
        check_step(ledger, call)?;
        if layer.0 >= self.shape.layers {
            let expected = format!("below {}", self.shape.layers);
            return Err(Error::mismatch("layer", expected, layer));
        }
        Ok(())
    }

    /// Whether attention of a layer may come now.
    ///
    /// # Errors
    /// As [`Progress::check_layer`]; [`Error::Order`] before the layer's `append`.
    pub fn check_attend(&self, ledger: &Ledger, layer: Layer) -> Result<()> {
        self.check_layer(ledger, "attend", layer)?;
        if !self.appended[layer.0] {
            let when = format!("before append of layer {layer}");
            return Err(Error::Order { call: "attend", when });
        }
        Ok(())
    }

    /// The step, where it may end now.
    ///
    /// # Errors
    /// [`Error::Order`] outside a step, or when a layer was not appended to.
    pub fn check_commit<'a>(&self, ledger: &'a Ledger) -> Result<&'a Step> {
        let step = check_step(ledger, "commit")?;
        if let Some(layer) = self.appended.iter().position(|appended| !appended) {
            let when = format!("before append of layer {layer}");
            return Err(Error::Order { call: "commit", when });
        }
        Ok(step)
    }

    /// Whether a view has the step's tokens, so many heads, and the model's channels.
    ///
    /// # Errors
    /// [`Error::Mismatch`].
    pub fn check_view(
        &self,
        ledger: &Ledger,
        what: &'static str,
        view: ViewShape,
        heads: usize,
    ) -> Result<()> {
        let tokens = ledger.step().map_or(0, |step| step.tokens);
        let head_dim = self.shape.head_dim;
        if (view.tokens, view.heads, view.head_dim) == (tokens, heads, head_dim) {
            return Ok(());
        }
        let expected = format!("[{tokens} tokens, {heads} heads, {head_dim} channels]");
        let found = format!("[{}, {}, {}]", view.tokens, view.heads, view.head_dim);
        Err(Error::mismatch(what, expected, found))
    }
}

/// The step under way; `call` is what was tried.
///
/// # Errors
/// [`Error::Order`] outside a step.
fn check_step<'a>(ledger: &'a Ledger, call: &'static str) -> Result<&'a Step> {
    ledger.step().ok_or_else(|| Error::Order { call, when: "without a plan".into() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CacheConfig, CacheLayout, LayoutRules, StepEntry};

    fn is_order<T: std::fmt::Debug>(result: Result<T>, says: &str) {
        let error = result.expect_err("out of order");
        assert!(
            matches!(error, Error::Order { .. }) && error.to_string().contains(says),
            "{error}"
        );
    }

    #[test]
    fn a_step_is_append_then_attend_per_layer_then_commit() {
        let shape = ModelShape::new(2, 4, 2, 16).unwrap();
        let config = CacheConfig::dense(shape).unwrap();
        let layout = CacheLayout::new(&config, LayoutRules::PACKED).unwrap();
        let mut ledger = Ledger::new(&layout, config.windows, None);
        let mut progress = Progress::new(shape);
        is_order(progress.check_layer(&ledger, "append", Layer(0)), "append called without a plan");
        is_order(progress.check_attend(&ledger, Layer(0)), "attend called without a plan");
        is_order(progress.check_commit(&ledger), "commit called without a plan");

        let sequence = ledger.add_sequence();
        ledger.plan(&[StepEntry::decode(sequence, 3)]).unwrap();
        progress.begin();
        progress.check_layer(&ledger, "append", Layer(1)).unwrap();
        for layer in [2, 3] {
            let error = progress.check_layer(&ledger, "append", Layer(layer)).unwrap_err();
            assert!(matches!(error, Error::Mismatch { what: "layer", .. }), "{error:?}");
        }
        is_order(progress.check_attend(&ledger, Layer(1)), "before append of layer 1");
        progress.mark(Layer(1));
        progress.check_attend(&ledger, Layer(1)).unwrap();
        is_order(progress.check_attend(&ledger, Layer(0)), "before append of layer 0");
        is_order(progress.check_commit(&ledger), "before append of layer 0");
        progress.mark_all();
        assert_eq!(progress.check_commit(&ledger).unwrap().tokens, 3);
        progress.begin();
        is_order(progress.check_commit(&ledger), "before append of layer 0");

        let view = ViewShape::contiguous(3, 4, 16);
        progress.check_view(&ledger, "q", view, 4).unwrap();
        let others = [
            (ViewShape { tokens: 2, ..view }, 4),
            (ViewShape { heads: 2, ..view }, 4),
            (ViewShape { head_dim: 8, ..view }, 4),
            (view, 2),
        ];
        for (view, heads) in others {
            let error = progress.check_view(&ledger, "q", view, heads).unwrap_err();
            assert!(matches!(error, Error::Mismatch { what: "q", .. }), "{error:?}");
        }
    }
}
