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
            for (peer, bar) in metric.comparisons() {
                let Some(ratio) = metric.ratio(peer) else {
                    continue;
                };
                let bar = bar.map_or_else(String::new, |bar| {
                    let sign = if metric.higher_is_better() {
                        '≥'
                    } else {
                        '≤'
                    };
                    let met = if metric.meets(ratio, bar) {
                        "met"
                    } else {
                        "NOT met"
                    };
                    format!(", to be {sign} {bar}: {met}")
                });
                println!("  = {ratio:.3} of {peer}{bar}");
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

    fn ratio(&self, peer: Contender) -> Option<f64> {
        let ratio = self.median(Contender::Ours)? / self.median(peer)?;
        // Nothing can be compared with a peer that lost nothing.
        ratio.is_finite().then_some(ratio)
    }

    fn meets(&self, ratio: f64, bar: f64) -> bool {
        if self.higher_is_better() {
            ratio >= bar
        } else {
            ratio <= bar
        }
    }

    fn bar(&self, bars: &[(&str, Unit, f64)]) -> Option<f64> {
        let mut bars = bars.iter();
        bars.find(|(start, unit, _)| self.name.starts_with(start) && self.unit == *unit)
            .map(|&(_, _, bar)| bar)
    }

    /// Whom ours is compared with, and what the ratio is to be.
    fn comparisons(&self) -> Vec<(Contender, Option<f64>)> {
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
        better.into_iter().chain(floor).collect()
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
        let row = |peer: Option<Contender>, bar: Option<f64>| {
            let ratio = peer.and_then(|peer| self.ratio(peer));
            json!({
                "metric": self.name, "unit": self.unit,
                "ours": self.median(Contender::Ours),
                "peer": peer.and_then(|peer| self.median(peer)),
                "peer_name": peer.map(|peer| peer.to_string()),
                "ratio": ratio, "bar": bar,
                "better": if self.higher_is_better() { "higher" } else { "lower" },
                "met": ratio.zip(bar).map(|(ratio, bar)| self.meets(ratio, bar)),
                "all": all,
            })
        };
        let comparisons = self.comparisons();
        if comparisons.is_empty() {
            return vec![row(None, None)];
        }
        comparisons
            .into_iter()
            .map(|(peer, bar)| row(Some(peer), bar))
            .collect()
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
