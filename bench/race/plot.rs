//! Two charts of a run, drawn as SVG: throughput against its cost, and memory against nodes.

use std::{fmt::Write, fs, path::Path};

use serde_json::Value;

/// Points of one contender: its name, and (x, y) in the units of the axes.
type Series = (String, Vec<(f64, f64)>);

struct Chart {
    title: &'static str,
    x: &'static str,
    y: &'static str,
    /// Both axes are logarithmic: equal steps multiply.
    logarithmic: bool,
    /// The points of a series are joined.
    joined: bool,
    series: Vec<Series>,
}

const WIDTH: f64 = 460.0;
const HEIGHT: f64 = 330.0;
/// Around the area of a chart: left, top, right, bottom.
const MARGINS: (f64, f64, f64, f64) = (62.0, 40.0, 14.0, 46.0);
/// In the order in which contenders appear; readable in print and by the colour-blind (Okabe, Ito).
const COLOURS: [&str; 6] = [
    "#d55e00", "#0072b2", "#56b4e9", "#009e73", "#999999", "#000000",
];

/// Draws the figures of a bench.json into a file.
pub fn draw(json: &Path, svg: &Path) {
    let text = fs::read(json).unwrap_or_else(|error| panic!("{}: {error}", json.display()));
    let rows: Vec<Value> = serde_json::from_slice(&text)
        .unwrap_or_else(|error| panic!("{} is no bench.json: {error}", json.display()));
    let charts = [throughput(&rows), memory(&rows)];
    fs::write(svg, document(&charts)).unwrap_or_else(|error| panic!("{}: {error}", svg.display()));
}

fn throughput(rows: &[Value]) -> Chart {
    let load = "tcp/1/there/default";
    let costs = medians(rows, load, "CPU-s/GB");
    let speeds = medians(rows, load, "Gbit/s");
    let series = costs.into_iter().filter_map(|(name, cost)| {
        let (_, speed) = speeds.iter().find(|(other, _)| *other == name)?;
        Some((name, vec![(cost, *speed)]))
    });
    Chart {
        title: "One TCP stream between two hosts",
        x: "CPU seconds of both daemons per GB",
        y: "Gbit/s",
        logarithmic: false,
        joined: false,
        series: series.collect(),
    }
}

fn memory(rows: &[Value]) -> Chart {
    let mut series: Vec<Series> = Vec::new();
    for nodes in [1, 10, 100] {
        for (name, each) in medians(rows, &format!("memory/idle/{nodes}"), "MiB/node") {
            let point = (f64::from(nodes), each * f64::from(nodes));
            match series.iter_mut().find(|(other, _)| *other == name) {
                Some((_, points)) => points.push(point),
                None => series.push((name, vec![point])),
            }
        }
    }
    Chart {
        title: "Idle nodes of one host",
        x: "nodes",
        y: "MiB of memory (PSS)",
        logarithmic: true,
        joined: true,
        series,
    }
}

/// Everyone's median of a metric, ours first.
fn medians(rows: &[Value], metric: &str, unit: &str) -> Vec<(String, f64)> {
    let mut rows = rows.iter();
    let row = rows.find(|row| row["metric"] == metric && row["unit"] == unit);
    let all = row.and_then(|row| row["all"].as_object());
    let mut medians: Vec<_> = all
        .into_iter()
        .flatten()
        .filter_map(|(name, figures)| Some((name.clone(), figures["median"].as_f64()?)))
        .collect();
    medians.sort_by_key(|(name, _)| (name != "tailnode", name.clone()));
    medians
}

fn document(charts: &[Chart]) -> String {
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        WIDTH * charts.len() as f64
    );
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in charts.iter().flat_map(|chart| &chart.series) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let colour = |name: &str| {
        let at = names.iter().position(|it| *it == name);
        COLOURS[at.expect("a name of a series") % COLOURS.len()]
    };
    for (number, chart) in charts.iter().enumerate() {
        let left = WIDTH * number as f64;
        let drawn = chart.draw(colour);
        writeln!(svg, "<g transform=\"translate({left} 0)\">\n{drawn}</g>").unwrap();
    }
    svg + "</svg>\n"
}

impl Chart {
    fn draw(&self, colour: impl Fn(&str) -> &'static str) -> String {
        let (left, top, right, bottom) = MARGINS;
        let (wide, high) = (WIDTH - left - right, HEIGHT - top - bottom);
        let points = || self.series.iter().flat_map(|(_, points)| points);
        let x_axis = Axis::over(points().map(|point| point.0), self.logarithmic);
        let y_axis = Axis::over(points().map(|point| point.1), self.logarithmic);
        let x_at = |value| left + wide * x_axis.share(value);
        let y_at = |value| top + high * (1.0 - y_axis.share(value));

        let mut svg = String::new();
        let middle = left + wide / 2.0;
        text(
            &mut svg,
            (middle, 22.0),
            "middle",
            self.title,
            "font-size=\"14\"",
        );
        text(&mut svg, (middle, HEIGHT - 10.0), "middle", self.x, "");
        let turn = format!("transform=\"rotate(-90 14 {0})\"", top + high / 2.0);
        text(&mut svg, (14.0, top + high / 2.0), "middle", self.y, &turn);
        for tick in x_axis.ticks() {
            let x = x_at(tick);
            line(&mut svg, &[(x, top), (x, top + high)], "#dddddd", 1.0);
            text(
                &mut svg,
                (x, top + high + 16.0),
                "middle",
                &number(tick),
                "",
            );
        }
        for tick in y_axis.ticks() {
            let y = y_at(tick);
            line(&mut svg, &[(left, y), (left + wide, y)], "#dddddd", 1.0);
            text(&mut svg, (left - 6.0, y + 4.0), "end", &number(tick), "");
        }
        let mut drawn: Vec<(f64, f64)> = Vec::new();
        for (index, (name, points)) in self.series.iter().enumerate() {
            let colour = colour(name);
            let places: Vec<_> = points.iter().map(|&(x, y)| (x_at(x), y_at(y))).collect();
            if self.joined {
                line(&mut svg, &places, colour, 2.0);
            }
            for &(x, y) in &places {
                // Where another is already, a ring around it.
                let near = |it: &(f64, f64)| (it.0 - x).hypot(it.1 - y) < 4.0;
                let shape = if drawn.iter().any(near) {
                    "r=\"7\" fill=\"none\" stroke-width=\"2.5\" stroke"
                } else {
                    "r=\"4\" fill"
                };
                writeln!(
                    svg,
                    "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" {shape}=\"{colour}\"/>"
                )
                .unwrap();
            }
            drawn.extend(places);
            let y = top + 14.0 + 16.0 * index as f64;
            let x = if self.joined {
                left + 12.0
            } else {
                left + wide - 150.0
            };
            writeln!(
                svg,
                "<circle cx=\"{x}\" cy=\"{}\" r=\"4\" fill=\"{colour}\"/>",
                y - 4.0
            )
            .unwrap();
            text(&mut svg, (x + 10.0, y), "start", name, "");
        }
        svg
    }
}

/// The values of an axis, from its beginning to its end.
struct Axis {
    from: f64,
    to: f64,
    logarithmic: bool,
}

impl Axis {
    /// Holds all these values; a linear one begins at 0.
    fn over(values: impl Iterator<Item = f64> + Clone, logarithmic: bool) -> Axis {
        let most = values.clone().fold(f64::MIN_POSITIVE, f64::max);
        if logarithmic {
            let least = values.fold(most, f64::min);
            Axis {
                from: 10_f64.powf(least.log10().floor()),
                to: 10_f64.powf(most.log10().ceil()),
                logarithmic,
            }
        } else {
            let step = step(most);
            Axis {
                from: 0.0,
                to: (most / step).ceil() * step,
                logarithmic,
            }
        }
    }

    /// How far along a value is, from 0 to 1.
    fn share(&self, value: f64) -> f64 {
        if self.logarithmic {
            let decades = (self.to / self.from).log10().max(1.0);
            (value / self.from).log10() / decades
        } else {
            value / self.to
        }
    }

    fn ticks(&self) -> Vec<f64> {
        let mut ticks = vec![self.from];
        let step = step(self.to);
        while let Some(&last) = ticks.last()
            && last < self.to * 0.999
        {
            ticks.push(if self.logarithmic {
                last * 10.0
            } else {
                last + step
            });
        }
        ticks
    }
}

/// A round number of which four to ten reach so far.
fn step(most: f64) -> f64 {
    let decade = 10_f64.powf(most.log10().floor());
    match most / decade {
        share if share > 5.0 => decade,
        share if share > 2.0 => decade / 2.0,
        _ => decade / 5.0,
    }
}

fn number(value: f64) -> String {
    let text = format!("{value:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn line(svg: &mut String, places: &[(f64, f64)], colour: &str, width: f64) {
    let places: Vec<_> = places
        .iter()
        .map(|(x, y)| format!("{x:.1},{y:.1}"))
        .collect();
    let places = places.join(" ");
    writeln!(
        svg,
        "<polyline points=\"{places}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"{width}\"/>"
    )
    .unwrap();
}

fn text(svg: &mut String, (x, y): (f64, f64), anchor: &str, words: &str, more: &str) {
    writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" {more}>{words}</text>"
    )
    .unwrap();
}
