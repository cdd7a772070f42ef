//! What stands at the head of a report: figures in a row, findings in words, facts as a list.

use leank::{InputRecord, Layer, MaskInfo, RunRecord};
use maud::{Markup, html};

use super::{
    curves::layer_losses,
    input::{Input, Learned},
    kl::change,
};
use crate::{
    figure::numbers::{self, shown},
    masks,
    output::bytes,
    record,
};

/// Context lengths of the header.
const CONTEXTS: [usize; 4] = [2 << 10, 8 << 10, 32 << 10, 128 << 10];
/// A layer's share of the loss from which on it is named.
const HEAVY_SHARE: f64 = 0.15;

/// The figures of the header.
pub(crate) fn headline(input: &Input) -> Markup {
    let mask = &input.own.mask;
    let summary = mask.summary();
    let text = input.own_evaluation().and_then(|own| own.text.as_ref());
    let error = text.and_then(|text| text.kl_standard_error);
    html! {
        dl.headline {
            (number("kept of K", &numbers::percent(summary.kept_k), "of its channels"))
            (number("kept of V", &numbers::percent(summary.kept_v), "live heads"))
            (number("dead heads", &summary.dead_heads.to_string(), &format!("of {}", summary.heads)))
            (number("middle", &numbers::percent(input.own.middle_bytes()), "of dense bytes"))
            @if let Some(kl) = input.own.info().predicted_kl {
                (number("predicted KL", &numbers::significant(kl), "nats, half to double"))
            }
            @if let Some(kl) = text.and_then(|text| text.kl) {
                (number("measured KL", &numbers::significant(kl), &error.map_or("nats per token".into(), |error| {
                    format!("± {} nats", numbers::significant(error))
                })))
            }
            @if let Some(text) = text {
                (number("perplexity", &change(text.perplexity_change()), &format!(
                    "from {}", text.dense_perplexity.map_or("–".into(), numbers::significant))))
            }
        }
        dl.headline.ratios {
            @for tokens in CONTEXTS {
                @if let Some((ratio, bytes)) = whole_kv(input, tokens) {
                    (number(&format!("whole-KV ratio at {}", numbers::tokens(tokens)), &ratio, &bytes))
                }
            }
        }
    }
}

/// The ratio at a context length, and the bytes behind it.
fn whole_kv(input: &Input, tokens: usize) -> Option<(String, String)> {
    let footprint = input.own.plan.footprint(tokens).ok()?;
    let bytes = format!("{} of {}", bytes(footprint.bytes), bytes(footprint.dense_bytes));
    Some((format!("{:.3}", footprint.whole_kv_ratio()?), bytes))
}

fn number(name: &str, value: &str, note: &str) -> Markup {
    html! { div { dt { (name) } dd { span.value { (value) } span.unit { (note) } } } }
}

/// A finding: how it is marked, and in words.
struct Finding {
    mark: Mark,
    text: String,
}

#[derive(Clone, Copy)]
enum Mark {
    Good,
    Look,
    Open,
}

impl Finding {
    fn new(mark: Mark, text: impl Into<String>) -> Self {
        Self { mark, text: text.into() }
    }
}

/// What speaks for the mask, what asks for a look, and what is not known.
pub(crate) fn findings(input: &Input) -> Markup {
    let mut all = vec![measured(input)];
    all.extend(perplexity(input));
    all.extend(own_texts(input));
    all.extend(identity(input.own.info()));
    all.extend(dead(input));
    if let Some(learned) = &input.learned {
        all.extend(of_dump(input, learned));
    }
    html! {
        section aria-labelledby="in-short" {
            h2 id="in-short" { "In short" }
            ul.findings {
                @for Finding { mark, text } in all {
                    @let (class, sign, word) = match mark {
                        Mark::Good => ("good", "✓", "Good: "),
                        Mark::Look => ("look", "!", "Look: "),
                        Mark::Open => ("open", "?", "Open: "),
                    };
                    li class=(class) {
                        span.sign aria-hidden="true" { (sign) }
                        span { span.hidden { (word) } (text) }
                    }
                }
            }
        }
    }
}

fn measured(input: &Input) -> Finding {
    let own = input.own_evaluation();
    let kl = own.and_then(|own| own.text.as_ref()?.kl);
    match (kl, input.own.info().predicted_kl) {
        (Some(kl), Some(predicted)) if predicted > 0.0 => {
            let ratio = kl / predicted;
            let within = (0.5..=2.0).contains(&ratio);
            let mark = if within { Mark::Good } else { Mark::Look };
            let words = if within {
                "within the factor of two that is usual"
            } else {
                "beyond the factor of two that is usual"
            };
            Finding::new(
                mark,
                format!("The measured KL is {ratio:.2} times the predicted one, {words}."),
            )
        }
        (Some(_), _) => Finding::new(
            Mark::Open,
            "The KL was measured, but the mask predicts none to compare it with.",
        ),
        (None, _) if own.is_some_and(|own| own.text.is_some()) => Finding::new(
            Mark::Look,
            "The measured KL is not finite: decoding through the lean cache, or the dense model itself, \
             gave numbers that are none.",
        ),
        (None, _) if own.is_some() => Finding::new(
            Mark::Open,
            "The evaluation of this mask read no text: no KL was measured.",
        ),
        (None, _) if !input.evaluations.is_empty() => Finding::new(
            Mark::Open,
            "None of the evaluations is of this mask as it is in its file.",
        ),
        (None, _) => Finding::new(
            Mark::Open,
            "What the mask costs was not measured: give what leank eval --json prints with --eval.",
        ),
    }
}

fn perplexity(input: &Input) -> Option<Finding> {
    let change_of = input.own_evaluation()?.text.as_ref()?.perplexity_change()?;
    let mark = if change_of < 0.02 { Mark::Good } else { Mark::Look };
    Some(Finding::new(
        mark,
        format!("Perplexity changes by {} on the evaluation’s texts.", change(Some(change_of))),
    ))
}

/// Whether it was measured on what it was learned from.
fn own_texts(input: &Input) -> Option<Finding> {
    let names = record::learned_from(&input.own.mask, &input.own_evaluation()?.texts)?;
    let text = format!(
        "The evaluation read {}, which the mask was learned from: on other text it will cost more.",
        shown(&names)
    );
    Some(Finding::new(Mark::Look, text))
}

fn identity(info: &MaskInfo) -> Option<Finding> {
    Some(match info.fingerprint {
        Some(_) => Finding::new(
            Mark::Good,
            "The mask carries its model’s fingerprint: it is refused for any other model.",
        ),
        None => Finding::new(
            Mark::Look,
            "The mask carries no fingerprint: only its shape tells whether it belongs to a model.",
        ),
    })
}

fn dead(input: &Input) -> Option<Finding> {
    let mask = &input.own.mask;
    let all_dead = |layer: &usize| mask.layer(Layer(*layer)).iter().all(|head| head.is_dead());
    let layers: Vec<usize> = (0..mask.layers()).filter(all_dead).collect();
    let share = |layers: usize| format!("{layers} of {} layers", mask.layers());
    match layers.len() {
        0 => None,
        n if n <= 6 => {
            let names: Vec<String> = layers.iter().map(ToString::to_string).collect();
            let text = format!(
                "In {} ({}) every KV head is dead: they see only the windows.",
                share(n),
                names.join(", ")
            );
            Some(Finding::new(Mark::Look, text))
        }
        n => Some(Finding::new(
            Mark::Look,
            format!("In {} every KV head is dead: they see only the windows.", share(n)),
        )),
    }
}

fn of_dump(input: &Input, learned: &Learned) -> Vec<Finding> {
    let mask = &input.own.mask;
    let mut all = Vec::new();
    let foreign = learned.foreign_heads(mask);
    if foreign > 0 {
        let text = format!(
            "{foreign} of {} KV heads keep other channels than this dump’s curves would: the mask was not \
             learned from it, or not with these windows.",
            mask.heads().len()
        );
        all.push(Finding::new(Mark::Look, text));
    }
    let sums: Vec<f64> = (0..mask.layers())
        .map(|layer| layer_losses(mask, learned, Layer(layer)).into_iter().flatten().sum())
        .collect();
    let total: f64 = sums.iter().sum();
    let heavy: Vec<String> = sums
        .iter()
        .enumerate()
        .filter(|(_, own)| total > 0.0 && **own / total >= HEAVY_SHARE && mask.layers() > 4)
        .map(|(layer, own)| format!("layer {layer} ({})", numbers::percent(own / total)))
        .collect();
    if !heavy.is_empty() {
        all.push(Finding::new(
            Mark::Look,
            format!("Much of the predicted loss sits in {}.", heavy.join(" and ")),
        ));
    }
    let (valid, middle) = (
        learned.manifest.valid_positions(),
        learned.manifest.positions_with_middle(learned.windows),
    );
    if middle < valid {
        let text = format!(
            "At {} of {valid} positions of the dump nothing lies between the windows: the predicted KL is \
             too low. Longer prefixes are the mend.",
            valid - middle
        );
        all.push(Finding::new(Mark::Look, text));
    }
    all
}

/// What the mask and the dump say about themselves.
pub(crate) fn facts(input: &Input) -> Markup {
    let (mask, info) = (&input.own.mask, input.own.info());
    let fingerprint = info.fingerprint.as_ref();
    let text = |value: &Option<String>| value.as_deref().map(shown);
    let rope = fingerprint.map(|own| {
        let scaling = own
            .rope_scaling
            .as_deref()
            .map_or(String::new(), |how| format!(", scaled: {}", shown(how)));
        format!("base {}{scaling}", numbers::significant(own.rope_base))
    });
    let exempt: Vec<String> = info.exempt_layers.iter().map(ToString::to_string).collect();
    let rows = [
        ("file", Some(input.own.name.clone())),
        ("SHA-256", Some(input.own.sha256.clone())),
        ("architecture", fingerprint.map(|own| shown(&own.architecture))),
        ("shape", Some(fingerprint.map_or(mask.to_string(), |own| own.shape.to_string()))),
        ("RoPE", rope),
        ("model’s hash", fingerprint.map(|own| shown(&own.config_hash))),
        ("method", text(&info.method)),
        ("budget", text(&info.budget)),
        ("alignment", info.alignment.map(|n| format!("{n} channels"))),
        ("windows", info.windows.map(|own| format!("sink {}, recent {}", own.sink, own.recent))),
        ("formats", Some(masks::format_words(&masks::heads_by_format(mask)))),
        ("exempt layers", (!exempt.is_empty()).then(|| exempt.join(", "))),
    ];
    html! {
        dl.facts {
            @for (name, value) in rows {
                @if let Some(value) = value { dt { (name) } dd { bdi { (value) } } }
            }
            (how_it_was_made(info))
            @if let Some(learned) = &input.learned { (dump(learned)) }
        }
    }
}

/// How the mask came about.
fn how_it_was_made(info: &MaskInfo) -> Markup {
    let inputs = |run: &RunRecord| {
        let name = |input: &InputRecord| {
            let digest: String = input.sha256.chars().take(12).collect();
            shown(&format!("{} {} ({digest})", input.role, input.name))
        };
        run.inputs.iter().map(name).collect::<Vec<_>>().join(", ")
    };
    html! {
        @if let Some(by) = &info.created_by { dt { "written by" } dd { bdi { (shown(by)) } } }
        @if let Some(seed) = info.seed { dt { "seed" } dd { (seed) } }
        @for run in &info.runs {
            dt { "made by" }
            dd {
                code { bdi { (shown(&run.shell_line())) } }
                " with seed " (run.seed) ", " bdi { (shown(&run.created_by)) }
                @if !run.inputs.is_empty() { "; from " bdi { (inputs(run)) } }
            }
        }
    }
}

fn dump(learned: &Learned) -> Markup {
    let manifest = &learned.manifest;
    let lengths = manifest.sequences.iter().map(|own| own.prefix);
    let (least, most) = (lengths.clone().min().unwrap_or(0), lengths.max().unwrap_or(0));
    let mut sources: Vec<String> =
        manifest.sequences.iter().map(|own| text_name(&own.source)).collect();
    sources.sort();
    sources.dedup();
    let more = sources.len().saturating_sub(12);
    sources.truncate(12);
    html! {
        dt { "learned from" }
        dd {
            (manifest.sequences.len()) " sequences × " (manifest.positions) " positions, prefixes of "
            (least) " to " (most) " tokens; " (manifest.probe) " probe, " (manifest.draws) " draws, seed "
            (manifest.seed)
        }
        dt { "texts" }
        dd { bdi { (sources.join(", ")) } @if more > 0 { " and " (more) " more" } }
    }
}

/// The name of a sequence's text, without where in it the sequence starts.
fn text_name(source: &str) -> String {
    shown(source.split_once(" tokens ").map_or(source, |(name, _)| name))
}
