//! What was measured, what is to be reached, and how the two compare.

use std::{cmp::Ordering, collections::BTreeMap, fs, path::Path};

use serde_json::{Value, json};

use crate::contender::Contender;

/// A unit of what is measured. Those of a rate are the better the higher they are.
pub type Unit = &'static str;

pub const CPU_PER_GB: Unit = "CPU-s/GB";
/// Of the whole machine, the apps included.
pub const MACHINE_PER_GB: Unit = "machine's CPU-s/GB";
pub const GBIT: Unit = "Gbit/s";
pub const PACKETS: Unit = "packets/s";
pub const CPU_PER_PACKET: Unit = "CPU-µs/packet";
pub const PERCENT_LOST: Unit = "% lost";
pub const MILLISECONDS: Unit = "ms";
pub const MIB_PER_NODE: Unit = "MiB/node";
pub const KIB_PER_PEER: Unit = "KiB/peer";
pub const CPU_PER_CHANGE: Unit = "CPU-ms/change";

/// How our figure is to compare with that of the better of the two tailscaleds: metrics whose names
/// begin so, in this unit. The first line that fits is the one that counts.
const BARS: &[(&str, Unit, f64)] = &[
    ("tcp/", CPU_PER_GB, 0.50),
    ("single/", CPU_PER_GB, 0.50),
    ("tcp/", GBIT, 1.8),
    ("udp/flat-out", PACKETS, 2.0),
    ("udp/", CPU_PER_PACKET, 0.5),
    ("local/default", GBIT, 4.0),
    ("local/cubic", GBIT, 7.0),
    ("local/", CPU_PER_GB, 0.12),
    ("rtt/loaded/p99", MILLISECONDS, 0.6),
    ("rtt/idle/p50", MILLISECONDS, 0.7),
    ("memory/idle/100", MIB_PER_NODE, 0.05),
    ("memory/loaded/100", MIB_PER_NODE, 0.05),
    ("start/cold/first-byte", MILLISECONDS, 0.25),
    ("start/known/first-byte", MILLISECONDS, 0.10),
    ("netmap/ready/10000", MILLISECONDS, 0.5),
    ("netmap/memory", KIB_PER_PEER, 0.3),
    ("netmap/", CPU_PER_CHANGE, 0.5),
];
/// The same against the floor.
const FLOOR_BARS: &[(&str, Unit, f64)] = &[("tcp/", GBIT, 0.85)];

/// How much more ours may be than an engine's own bridge, in the metric's unit.
const MORE_BARS: &[(&str, Unit, f64)] = &[
    ("engine/cold/running", MILLISECONDS, 150.0),
    ("engine/cold/whole", MILLISECONDS, 150.0),
    ("engine/known/running", MILLISECONDS, 30.0),
    ("engine/known/whole", MILLISECONDS, 30.0),
];

/// All figures of a run.
#[derive(Default)]
pub struct Report {
    metrics: Vec<Metric>,
}

struct Metric {
    name: String,
    unit: Unit,
    figures: BTreeMap<Contender, Vec<f64>>,
}

/// Ours beside a peer.
struct Comparison {
    peer: Contender,
    outcome: Outcome,
    /// What the outcome is to be at most or, where higher is better, at least.
    bar: Option<f64>,
}

enum Outcome {
    /// Ours, divided by the peer's.
    Ratio(f64),
    /// Ours less the peer's, which it has in it.
    More(f64),
    /// Nothing can be compared with a peer that lost nothing.
    None,
}

/// Several figures of one thing.
struct Spread {
    median: f64,
    least: f64,
    most: f64,
}

impl Report {
    /// Takes one figure of a contender.
    pub fn add(&mut self, contender: Contender, name: &str, unit: Unit, figure: f64) {
        let known = self
            .metrics
            .iter()
            .position(|metric| metric.name == name && metric.unit == unit);
        let at = known.unwrap_or_else(|| {
            self.metrics.push(Metric {
                name: name.to_owned(),
                unit,
                figures: BTreeMap::new(),
            });
            self.metrics.len() - 1
        });
        let figures = &mut self.metrics[at].figures;
        figures.entry(contender).or_default().push(figure);
    }

    /// Says for each metric what everyone's median and range are, and how ours compares.
    pub fn print(&self) {
        for metric in &self.metrics {
            println!("\n{} [{}]", metric.name, metric.unit);
            for (contender, figures) in &metric.figures {
                let Spread {
                    median,
                    least,
                    most,
                } = Spread::of(figures);
                println!("  {contender:22} {median:>10.3}  ({least:.3} to {most:.3})");
            }
            for comparison in metric.comparisons() {
                let (figure, of) = match comparison.outcome {
                    Outcome::Ratio(ratio) => (ratio, "of"),
                    Outcome::More(more) => (more, "more than"),
                    Outcome::None => continue,
                };
                let verdict = comparison.bar.map_or_else(String::new, |bar| {
                    let sign = if metric.higher_is_better() {
                        '≥'
                    } else {
                        '≤'
                    };
                    let met = if metric.meets(figure, bar) {
                        "met"
                    } else {
                        "NOT met"
                    };
                    format!(", to be {sign} {bar}: {met}")
                });
                println!("  = {figure:.3} {of} {}{verdict}", comparison.peer);
            }
        }
    }

    /// Writes the same as JSON: one object for each comparison.
    pub fn write(&self, file: &Path) {
        let rows: Vec<Value> = self.metrics.iter().flat_map(Metric::rows).collect();
        let text = format!("{:#}\n", Value::from(rows));
        fs::write(file, text).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    }
}

impl Metric {
    fn higher_is_better(&self) -> bool {
        self.unit.ends_with("/s")
    }

    fn median(&self, contender: Contender) -> Option<f64> {
        Some(Spread::of(self.figures.get(&contender)?).median)
    }

    fn compare(&self, peer: Contender, bar: Option<f64>) -> Comparison {
        let figures = self.median(Contender::Ours).zip(self.median(peer));
        let outcome = match figures {
            Some((ours, its)) if peer.is_bridge() => Outcome::More(ours - its),
            Some((ours, its)) if (ours / its).is_finite() => Outcome::Ratio(ours / its),
            _ => Outcome::None,
        };
        Comparison { peer, outcome, bar }
    }

    fn meets(&self, figure: f64, bar: f64) -> bool {
        if self.higher_is_better() {
            figure >= bar
        } else {
            figure <= bar
        }
    }

    fn bar(&self, bars: &[(&str, Unit, f64)]) -> Option<f64> {
        let mut bars = bars.iter();
        bars.find(|(start, unit, _)| self.name.starts_with(start) && self.unit == *unit)
            .map(|&(_, _, bar)| bar)
    }

    fn comparisons(&self) -> Vec<Comparison> {
        let mut peers: Vec<_> = self
            .figures
            .keys()
            .copied()
            .filter(|contender| matches!(contender, Contender::Tailscaled(_)))
            .collect();
        // The better one first.
        peers.sort_by(|&a, &b| {
            let order = self.median(a).partial_cmp(&self.median(b));
            let order = order.unwrap_or(Ordering::Equal);
            if self.higher_is_better() {
                order.reverse()
            } else {
                order
            }
        });
        let better = peers.first().map(|&peer| (peer, self.bar(BARS)));
        let floor = self
            .bar(FLOOR_BARS)
            .filter(|_| self.figures.contains_key(&Contender::Floor));
        let floor = floor.map(|bar| (Contender::Floor, Some(bar)));
        let bridges = self.figures.keys().copied().filter(|peer| peer.is_bridge());
        let bridges = bridges.map(|peer| {
            let default = matches!(peer, Contender::Bridge(_));
            (peer, self.bar(MORE_BARS).filter(|_| default))
        });
        better
            .into_iter()
            .chain(floor)
            .chain(bridges)
            .map(|(peer, bar)| self.compare(peer, bar))
            .collect()
    }

    fn rows(&self) -> Vec<Value> {
        let all: serde_json::Map<String, Value> = self
            .figures
            .iter()
            .map(|(contender, figures)| {
                let spread = Spread::of(figures);
                let value = json!({
                    "median": spread.median, "min": spread.least, "max": spread.most,
                    "rounds": figures.len(),
                });
                (contender.to_string(), value)
            })
            .collect();
        let row = |comparison: Option<&Comparison>| {
            let peer = comparison.map(|comparison| comparison.peer);
            let bar = comparison.and_then(|comparison| comparison.bar);
            let (ratio, difference) = match comparison.map(|comparison| &comparison.outcome) {
                Some(&Outcome::Ratio(ratio)) => (Some(ratio), None),
                Some(&Outcome::More(more)) => (None, Some(more)),
                Some(Outcome::None) | None => (None, None),
            };
            let figure = ratio.or(difference);
            json!({
                "metric": self.name, "unit": self.unit,
                "ours": self.median(Contender::Ours),
                "peer": peer.and_then(|peer| self.median(peer)),
                "peer_name": peer.map(|peer| peer.to_string()),
                "ratio": ratio, "difference": difference, "bar": bar,
                "better": if self.higher_is_better() { "higher" } else { "lower" },
                "met": figure.zip(bar).map(|(figure, bar)| self.meets(figure, bar)),
                "all": all,
            })
        };
        let comparisons = self.comparisons();
        if comparisons.is_empty() {
            return vec![row(None)];
        }
        comparisons.iter().map(|it| row(Some(it))).collect()
    }
}

impl Spread {
    /// Of at least one figure.
    fn of(figures: &[f64]) -> Spread {
        let mut sorted = figures.to_vec();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        let median = if sorted.len().is_multiple_of(2) {
            (sorted[middle - 1] + sorted[middle]) / 2.0
        } else {
            sorted[middle]
        };
        Spread {
            median,
            least: sorted[0],
            most: sorted[sorted.len() - 1],
        }
    }
}
