//! How far a command is, on standard error: a bar at a terminal, a line now and then in a log, or events
//! for a program.

use std::{
    io::IsTerminal as _,
    sync::{Mutex, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::output;

/// How progress is told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Mode {
    /// A bar at a terminal, lines elsewhere.
    #[default]
    Auto,
    /// A bar, redrawn in place.
    Bar,
    /// A line every ten seconds, for logs.
    Lines,
    /// Events for programs, one JSON object a line.
    Json,
    /// Nothing.
    None,
}

static MODE: OnceLock<Mode> = OnceLock::new();

/// Tells progress in this way from now on.
pub(crate) fn set_mode(mode: Mode) {
    let mode = match mode {
        Mode::Auto if std::io::stderr().is_terminal() => Mode::Bar,
        Mode::Auto => Mode::Lines,
        mode => mode,
    };
    // Set once, from the arguments.
    let _ = MODE.set(mode);
}

fn mode() -> Mode {
    MODE.get().copied().unwrap_or(Mode::None)
}

/// Something that happened.
#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Event<'a> {
    Progress {
        phase: &'a str,
        done: u64,
        total: u64,
        /// Of those done, how many an earlier run had done.
        reused: u64,
        elapsed_seconds: f64,
        /// Absent before anything is done.
        left_seconds: Option<f64>,
    },
    Error {
        message: &'a str,
    },
}

/// Prints an event where events are printed.
fn event(event: &Event<'_>) {
    if let Ok(line) = serde_json::to_string(event) {
        output::note(line);
    }
}

/// Tells why the command failed.
pub(crate) fn failed(message: &str) {
    match mode() {
        Mode::Json => event(&Event::Error { message }),
        _ => output::note(format_args!("leank: {message}")),
    }
}

/// The progress of one command, over one or more phases.
pub(crate) struct Progress {
    bar: ProgressBar,
    state: Mutex<State>,
}

struct State {
    phase: String,
    began: Instant,
    /// When something was told, and of which count.
    told: Option<(Instant, u64)>,
}

impl Progress {
    /// Before anything is done.
    pub(crate) fn new(phase: &str) -> Self {
        let bar = match mode() {
            Mode::Bar => ProgressBar::new(0),
            _ => ProgressBar::hidden(),
        };
        let template = "{msg:<24} {wide_bar} {pos}/{len} {elapsed} (left: {eta})";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(phase.to_owned());
        let state = State { phase: phase.to_owned(), began: Instant::now(), told: None };
        Self { bar, state: Mutex::new(state) }
    }

    /// `done` of `total` are done in the phase under way.
    pub(crate) fn at(&self, done: usize, total: usize) {
        let phase = self.state.lock().unwrap_or_else(PoisonError::into_inner).phase.clone();
        self.in_phase(&phase, (done, 0), total);
    }

    /// `done` of `total` are done in `phase`, `reused` of them by an earlier run.
    pub(crate) fn in_phase(&self, phase: &str, (done, reused): (usize, usize), total: usize) {
        let (done, reused, total) = (done as u64, reused as u64, total as u64);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.phase != phase {
            *state = State { phase: phase.to_owned(), began: Instant::now(), told: None };
            self.bar.reset();
            self.bar.set_message(phase.to_owned());
        }
        if mode() == Mode::Bar {
            self.bar.set_length(total);
            self.bar.set_position(done);
            return;
        }
        let (pause, first) = match mode() {
            Mode::Json => (Duration::from_millis(200), true),
            Mode::Lines => (Duration::from_secs(10), false),
            _ => return,
        };
        let due = match state.told {
            // A line about what is over in a moment is noise.
            None => first || state.began.elapsed() >= pause,
            Some((_, told)) if told == done => false,
            Some((at, _)) => at.elapsed() >= pause || (first && done == total),
        };
        if !due {
            return;
        }
        state.told = Some((Instant::now(), done));
        let elapsed = state.began.elapsed().as_secs_f64();
        let left = left(elapsed, (done, reused), total);
        if mode() == Mode::Json {
            event(&Event::Progress {
                phase,
                done,
                total,
                reused,
                elapsed_seconds: elapsed,
                left_seconds: left,
            });
        } else {
            let left = left.map_or(String::new(), |left| format!(", {} left", duration(left)));
            output::note(format_args!(
                "{phase}: {done} of {total} after {}{left}",
                duration(elapsed)
            ));
        }
    }

    /// All is done: takes the bar away.
    pub(crate) fn finish(self) {
        self.bar.finish_and_clear();
    }
}

/// Seconds left at the pace so far; what an earlier run had done took no time.
fn left(elapsed: f64, (done, reused): (u64, u64), total: u64) -> Option<f64> {
    let own = done.checked_sub(reused).filter(|&own| own > 0)?;
    Some(elapsed / own as f64 * total.saturating_sub(done) as f64)
}

/// Seconds as people say them.
fn duration(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds} s"),
        (0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (hours, minutes, _) => format!("{hours} h {minutes} min"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_follows_from_the_own_pace() {
        assert_eq!(left(10.0, (0, 0), 5), None);
        assert_eq!(left(10.0, (3, 3), 5), None);
        assert_eq!(left(10.0, (5, 3), 9), Some(20.0));
        assert_eq!(left(10.0, (9, 3), 9), Some(0.0));
    }

    #[test]
    fn durations_are_read_at_a_glance() {
        let all = [0.4, 59.6, 61.0, 3600.0, 7384.0].map(duration);
        assert_eq!(all, ["0 s", "1 min 0 s", "1 min 1 s", "1 h 0 min", "2 h 3 min"]);
    }
}
