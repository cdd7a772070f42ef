//! From values to coordinates.

/// Largest number that an axis holds: far from where sums and ratios overflow.
const MOST: f64 = 1e150;

/// An axis: a domain of values, linear or logarithmic, on a range of coordinates.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scale {
    domain: (f64, f64),
    range: (f64, f64),
    log: bool,
}

impl Scale {
    /// From `domain` to `range`. A domain that is none becomes one that holds its start.
    pub(crate) fn linear(domain: (f64, f64), range: (f64, f64)) -> Self {
        let (from, to) = domain;
        let fine = |x: f64| x.abs() <= MOST;
        let from = if fine(from) { from } else { 0.0 };
        let to = if fine(to) && to > from { to } else { from + from.abs().max(1.0) };
        Self { domain: (from, to), range, log: false }
    }

    /// The same with equal ways for equal ratios. A domain that is none, or not positive, becomes a
    /// decade that holds what can be held of it.
    pub(crate) fn log(domain: (f64, f64), range: (f64, f64)) -> Self {
        let fine = |x: f64| (1.0 / MOST..=MOST).contains(&x);
        let (from, to) = match domain {
            (from, to) if fine(from) && fine(to) && to > from => (from, to),
            (_, to) if fine(to) => (to / 10.0, to),
            (from, _) if fine(from) => (from, from * 10.0),
            _ => (0.1, 1.0),
        };
        Self { domain: (from, to), range, log: true }
    }

    /// Where a value lies; at the end of the range where it is out of the domain.
    pub(crate) fn at(&self, value: f64) -> f64 {
        let (from, to) = self.domain;
        let value = if value.is_nan() { from } else { value.clamp(from, to) };
        let share = match self.log {
            true => (value / from).ln() / (to / from).ln(),
            false => (value - from) / (to - from),
        };
        self.range.0 + share * (self.range.1 - self.range.0)
    }

    /// Where the domain starts and ends.
    pub(crate) fn ends(&self) -> (f64, f64) {
        self.range
    }

    /// Round values in the domain, about `about` of them.
    pub(crate) fn ticks(&self, about: usize) -> Vec<f64> {
        let about = about.max(1) as f64;
        let (from, to) = self.domain;
        if !self.log {
            let step = round_step((to - from) / about);
            let first = (from / step).ceil();
            let values = (0..=100).map(|i| (first + f64::from(i)) * step);
            return values.take_while(|&tick| tick <= to + step * 1e-9).collect();
        }
        let (low, high) = (from.log10(), to.log10());
        let decades = high - low;
        if decades < 2.2 {
            let (first, last) = (low.floor() as i32, high.ceil() as i32);
            let values = (first..=last).flat_map(|e| [1.0, 2.0, 5.0].map(|m| m * 10f64.powi(e)));
            return values.filter(|tick| (from..=to).contains(tick)).collect();
        }
        let every = (decades / about).ceil().max(1.0) as usize;
        let (first, last) = ((low - 1e-9).ceil() as i32, (high + 1e-9).floor() as i32);
        (first..=last).step_by(every).map(|e| 10f64.powi(e)).collect()
    }
}

/// 1, 2 or 5 times a power of ten, at least `step`.
fn round_step(step: f64) -> f64 {
    let power = 10f64.powf(step.log10().floor());
    let factor = [1.0, 2.0, 5.0].into_iter().find(|factor| factor * power >= step * (1.0 - 1e-9));
    factor.unwrap_or(10.0) * power
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_lie_where_they_belong() {
        let linear = Scale::linear((0.0, 2.0), (10.0, 20.0));
        assert_eq!(
            [0.0, 1.0, 2.0, 9.0, f64::NAN].map(|x| linear.at(x)),
            [10.0, 15.0, 20.0, 20.0, 10.0]
        );
        let log = Scale::log((1.0, 100.0), (100.0, 0.0));
        assert_eq!(
            [1.0, 10.0, 100.0, 0.0, -3.0].map(|x| log.at(x)),
            [100.0, 50.0, 0.0, 100.0, 100.0]
        );
    }

    #[test]
    fn ticks_are_round_and_within() {
        let near = |found: Vec<f64>, expected: &[f64]| {
            assert_eq!(found.len(), expected.len(), "{found:?}");
            assert!(
                found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-9 * b.abs().max(1e-9)),
                "{found:?}"
            );
        };
        near(Scale::linear((0.0, 1.0), (0.0, 1.0)).ticks(5), &[0.0, 0.2, 0.4, 0.6, 0.8, 1.0]);
        near(Scale::linear((3.0, 47.0), (0.0, 1.0)).ticks(4), &[20.0, 40.0]);
        near(Scale::log((1e-5, 1e-1), (0.0, 1.0)).ticks(9), &[1e-5, 1e-4, 1e-3, 1e-2, 1e-1]);
        near(Scale::log((1e-3, 4e-3), (0.0, 1.0)).ticks(9), &[1e-3, 2e-3]);
    }

    #[test]
    fn nothing_breaks_a_scale() {
        let odd = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, -1.0, 1e308, 1e-320, 5.0];
        for from in odd {
            for to in odd {
                for scale in
                    [Scale::linear((from, to), (0.0, 1.0)), Scale::log((from, to), (0.0, 1.0))]
                {
                    assert!(odd.iter().all(|&x| scale.at(x).is_finite()), "{scale:?}");
                    assert!(scale.ticks(5).len() <= 101, "{scale:?}");
                }
            }
        }
    }
}
