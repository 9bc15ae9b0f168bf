//! Small plots as SVG text: lines and bars, with intervals, for reports and the README.
//!
//! One look for all of them, no state, no styling options: a caller gives names and numbers.
//! Numbers that are not finite are left out, as are those a logarithmic axis cannot show.
//!
//! ```
//! use simpatico_engine::plot::{Axis, Lines, Series};
//! let plot = Lines {
//!     title: "Cold start".into(),
//!     x: Axis::linear("edges known"),
//!     y: Axis::linear("AUC"),
//!     series: vec![Series::new("sage", [(0.0, 0.6), (4.0, 0.71), (16.0, 0.75)])],
//! };
//! assert!(plot.to_svg().starts_with("<svg"));
//! ```

use std::fmt::Write;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 72.0;
const RIGHT: f64 = 170.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = 58.0;
/// Told apart in print and by most colour-blind eyes (Okabe and Ito, 2008).
const COLORS: [&str; 8] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8a8a00",
];

/// How an axis runs, and its label.
#[derive(Clone, Debug)]
pub struct Axis {
    /// Written beside the axis, with the unit.
    pub label: String,
    /// Whether equal ratios take equal space.
    pub logarithmic: bool,
}

impl Axis {
    /// Equal differences take equal space.
    pub fn linear(label: &str) -> Self {
        let label = label.to_string();
        Self {
            label,
            logarithmic: false,
        }
    }

    /// Equal ratios take equal space.
    pub fn logarithmic(label: &str) -> Self {
        Self {
            logarithmic: true,
            ..Self::linear(label)
        }
    }
}

/// A number to show, perhaps with the interval it may lie in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Value {
    /// The number.
    pub value: f64,
    /// Lower and upper end of, say, a 95% interval.
    pub interval: Option<(f64, f64)>,
}

impl From<f64> for Value {
    fn from(value: f64) -> Self {
        Self {
            value,
            interval: None,
        }
    }
}

/// One line: a name and its points, by x rising.
#[derive(Clone, Debug)]
pub struct Series {
    /// Written in the legend.
    pub name: String,
    /// The points.
    pub points: Vec<(f64, Value)>,
}

impl Series {
    /// A line; `points` are (x, y), y a number or a [`Value`].
    pub fn new<V: Into<Value>>(name: &str, points: impl IntoIterator<Item = (f64, V)>) -> Self {
        let points = points.into_iter().map(|(x, y)| (x, y.into())).collect();
        let name = name.to_string();
        Self { name, points }
    }
}

/// A plot of lines.
#[derive(Clone, Debug)]
pub struct Lines {
    /// Above the plot.
    pub title: String,
    /// The axis across.
    pub x: Axis,
    /// The axis upwards.
    pub y: Axis,
    /// The lines, in the legend's order.
    pub series: Vec<Series>,
}

/// A plot of bars in groups: one group for each of `groups`, in it one bar of each series.
#[derive(Clone, Debug)]
pub struct Bars {
    /// Above the plot.
    pub title: String,
    /// Beside the axis upwards.
    pub y_label: String,
    /// Below the groups.
    pub groups: Vec<String>,
    /// Name and the value in each group; `None` leaves the place empty.
    pub series: Vec<(String, Vec<Option<Value>>)>,
}

impl Lines {
    /// The plot as the text of an SVG file.
    pub fn to_svg(&self) -> String {
        let shown = |axis: &Axis, v: f64| v.is_finite() && (!axis.logarithmic || v > 0.0);
        let keep = |series: &Series| -> Vec<(f64, Value)> {
            let points = series.points.iter().copied();
            points
                .filter(|(x, y)| shown(&self.x, *x) && shown(&self.y, y.value))
                .collect()
        };
        let lines: Vec<_> = self.series.iter().map(keep).collect();
        let all = || lines.iter().flatten();
        let x = Scale::new(&self.x, all().map(|p| p.0), LEFT, WIDTH - RIGHT);
        let ends = |(_, y): &(f64, Value)| {
            let (low, high) = y.interval.unwrap_or((y.value, y.value));
            [y.value, low, high]
        };
        let y = Scale::new(&self.y, all().flat_map(ends), HEIGHT - BOTTOM, TOP);
        let mut svg = frame(&self.title);
        grid(&mut svg, &y, &self.y.label);
        for tick in &x.ticks {
            let at = x.place(*tick);
            let base = HEIGHT - BOTTOM;
            line(&mut svg, (at, base), (at, base + 5.0), "#444", 1.0);
            text(&mut svg, (at, base + 19.0), "middle", &number(*tick));
        }
        let middle = (LEFT + WIDTH - RIGHT) / 2.0;
        text(&mut svg, (middle, HEIGHT - 14.0), "middle", &self.x.label);
        for (i, points) in lines.iter().enumerate() {
            let color = COLORS[i % COLORS.len()];
            let places: Vec<_> = points
                .iter()
                .map(|(px, py)| (x.place(*px), y.place(py.value)))
                .collect();
            let path: Vec<_> = places
                .iter()
                .map(|(a, b)| format!("{a:.1},{b:.1}"))
                .collect();
            let _ = writeln!(
                svg,
                r#"<polyline points="{}" fill="none" stroke="{color}" stroke-width="2"/>"#,
                path.join(" ")
            );
            for ((a, b), (_, value)) in places.iter().zip(points) {
                whisker(&mut svg, *a, value, &y, color);
                if points.len() <= 40 {
                    let _ = writeln!(
                        svg,
                        r#"<circle cx="{a:.1}" cy="{b:.1}" r="3" fill="{color}"/>"#
                    );
                }
            }
        }
        legend(&mut svg, self.series.iter().map(|s| s.name.as_str()));
        svg.push_str("</svg>\n");
        svg
    }
}

impl Bars {
    /// The plot as the text of an SVG file.
    pub fn to_svg(&self) -> String {
        let values = || {
            self.series
                .iter()
                .flat_map(|(_, values)| values.iter().flatten())
        };
        let ends = values().flat_map(|v| {
            let (low, high) = v.interval.unwrap_or((v.value, v.value));
            [0.0, v.value, low, high]
        });
        let y = Scale::new(&Axis::linear(&self.y_label), ends, HEIGHT - BOTTOM, TOP);
        let mut svg = frame(&self.title);
        grid(&mut svg, &y, &self.y_label);
        let room = (WIDTH - LEFT - RIGHT) / self.groups.len().max(1) as f64;
        let bar = 0.8 * room / self.series.len().max(1) as f64;
        for (g, group) in self.groups.iter().enumerate() {
            let left = LEFT + room * g as f64;
            text(
                &mut svg,
                (left + room / 2.0, HEIGHT - BOTTOM + 19.0),
                "middle",
                group,
            );
            for (s, (_, values)) in self.series.iter().enumerate() {
                let Some(value) = values.get(g).copied().flatten() else {
                    continue;
                };
                if !value.value.is_finite() {
                    continue;
                }
                let color = COLORS[s % COLORS.len()];
                let at = left + 0.1 * room + bar * s as f64;
                let (zero, end) = (y.place(0.0), y.place(value.value));
                let _ = writeln!(
                    svg,
                    r#"<rect x="{at:.1}" y="{:.1}" width="{:.1}" height="{:.1}" fill="{color}"/>"#,
                    zero.min(end),
                    bar * 0.92,
                    (zero - end).abs()
                );
                whisker(&mut svg, at + bar * 0.46, &value, &y, "#222");
            }
        }
        legend(&mut svg, self.series.iter().map(|(name, _)| name.as_str()));
        svg.push_str("</svg>\n");
        svg
    }
}

/// From numbers to places on one axis.
struct Scale {
    logarithmic: bool,
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    ticks: Vec<f64>,
}

impl Scale {
    fn new(axis: &Axis, values: impl Iterator<Item = f64>, from: f64, to: f64) -> Self {
        let logarithmic = axis.logarithmic;
        let usable = |v: &f64| v.is_finite() && (!logarithmic || *v > 0.0);
        let (mut low, mut high) = values
            .filter(usable)
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| {
                (l.min(v), h.max(v))
            });
        if low > high {
            (low, high) = (if logarithmic { 0.1 } else { 0.0 }, 1.0);
        }
        let ticks;
        if logarithmic {
            (low, high) = (low.log10().floor(), high.log10().ceil());
            if low == high {
                high += 1.0;
            }
            let step = ((high - low) / 8.0).ceil().max(1.0);
            let count = ((high - low) / step).floor() as usize;
            ticks = (0..=count)
                .map(|i| 10f64.powf(low + step * i as f64))
                .collect();
        } else {
            if high - low <= f64::EPSILON * high.abs().max(1.0) {
                let pad = 0.1 * high.abs().max(1.0);
                (low, high) = (low - pad, high + pad);
            }
            let step = round_step((high - low) / 5.0);
            (low, high) = ((low / step).floor() * step, (high / step).ceil() * step);
            let count = ((high - low) / step).round() as usize;
            ticks = (0..=count).map(|i| low + step * i as f64).collect();
        }
        Self {
            logarithmic,
            low,
            high,
            from,
            to,
            ticks,
        }
    }

    fn place(&self, value: f64) -> f64 {
        let value = if self.logarithmic {
            value.max(f64::MIN_POSITIVE).log10()
        } else {
            value
        };
        let share = (value - self.low) / (self.high - self.low);
        self.from + share.clamp(-0.05, 1.05) * (self.to - self.from)
    }
}

/// The next of 1, 2, 5 times a power of ten.
fn round_step(raw: f64) -> f64 {
    let power = 10f64.powf(raw.log10().floor());
    match raw / power {
        r if r <= 1.0 => power,
        r if r <= 2.0 => 2.0 * power,
        r if r <= 5.0 => 5.0 * power,
        _ => 10.0 * power,
    }
}

fn number(value: f64) -> String {
    let size = value.abs();
    if size != 0.0 && !(1e-3..1e6).contains(&size) {
        return format!("{value:.0e}");
    }
    let text = format!("{value:.4}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" {
        "0".into()
    } else {
        text.into()
    }
}

fn frame(title: &str) -> String {
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         width=\"{WIDTH}\" height=\"{HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let _ = writeln!(
        svg,
        r#"<text x="{LEFT}" y="24" font-size="15" font-weight="bold">{}</text>"#,
        escape(title)
    );
    svg
}

fn grid(svg: &mut String, y: &Scale, label: &str) {
    for tick in &y.ticks {
        let at = y.place(*tick);
        line(svg, (LEFT, at), (WIDTH - RIGHT, at), "#ddd", 1.0);
        text(svg, (LEFT - 8.0, at + 4.0), "end", &number(*tick));
    }
    let base = HEIGHT - BOTTOM;
    line(svg, (LEFT, base), (WIDTH - RIGHT, base), "#444", 1.0);
    line(svg, (LEFT, base), (LEFT, TOP), "#444", 1.0);
    let middle = (TOP + base) / 2.0;
    let _ = writeln!(
        svg,
        r#"<text x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">{}</text>"#,
        escape(label)
    );
}

fn legend<'a>(svg: &mut String, names: impl Iterator<Item = &'a str>) {
    for (i, name) in names.enumerate() {
        let y = TOP + 18.0 * i as f64;
        let x = WIDTH - RIGHT + 14.0;
        let color = COLORS[i % COLORS.len()];
        let _ = writeln!(
            svg,
            r#"<rect x="{x}" y="{}" width="12" height="12" fill="{color}"/>"#,
            y - 10.0
        );
        text(svg, (x + 18.0, y), "start", name);
    }
}

fn whisker(svg: &mut String, x: f64, value: &Value, y: &Scale, color: &str) {
    let Some((low, high)) = value.interval else {
        return;
    };
    if low.is_finite() && high.is_finite() {
        let (low, high) = (y.place(low), y.place(high));
        line(svg, (x, low), (x, high), color, 1.2);
        for end in [low, high] {
            line(svg, (x - 3.0, end), (x + 3.0, end), color, 1.2);
        }
    }
}

fn line(svg: &mut String, from: (f64, f64), to: (f64, f64), color: &str, width: f64) {
    let ((x1, y1), (x2, y2)) = (from, to);
    let _ = writeln!(
        svg,
        r#"<line x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}" stroke="{color}" stroke-width="{width}"/>"#
    );
}

fn text(svg: &mut String, (x, y): (f64, f64), anchor: &str, words: &str) {
    let words = escape(words);
    let _ = writeln!(
        svg,
        r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{words}</text>"#
    );
}

/// In the head of every page of ours, so that a page can be told from others' files.
pub const MADE_HERE: &str = "<meta name=generator content=Simpatico>";

/// A whole HTML page around parts that are HTML already: it needs no other file.
pub fn page(title: &str, parts: &[String]) -> String {
    const STYLE: &str = "body{font:15px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}\
        pre,table{font-size:13px}pre{overflow-x:auto;background:#f6f6f6;padding:.8rem}\
        td,th{padding:.15rem .8rem .15rem 0;text-align:left;vertical-align:top}svg{max-width:100%;height:auto}";
    let title = escape(title);
    format!(
        "<!doctype html>\n<html lang=en><meta charset=utf-8>\
         <meta name=viewport content=\"width=device-width\">{MADE_HERE}\n<title>{title}</title>\n\
         <style>{STYLE}</style>\n<h1>{title}</h1>\n{}\n</html>\n",
        parts.join("\n")
    )
}

/// Words that stand in a page as they are, line for line.
pub fn verbatim(words: &str) -> String {
    format!("<pre>{}</pre>", escape_lines(words))
}

fn escape_lines(words: &str) -> String {
    words.lines().map(escape).collect::<Vec<_>>().join("\n")
}

/// The text with markup made harmless, control characters as spaces.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot(points: &[(f64, f64)], axis: fn(&str) -> Axis) -> String {
        let lines = Lines {
            title: "a < b & \"c\"".into(),
            x: axis("x"),
            y: axis("y"),
            series: vec![Series::new("s", points.iter().copied())],
        };
        lines.to_svg()
    }

    #[test]
    fn higher_values_stand_higher() {
        let svg = plot(&[(0.0, 1.0), (1.0, 2.0)], Axis::linear);
        let points = svg.split("points=\"").nth(1).unwrap();
        let points = points.split('"').next().unwrap();
        let place = |i: usize| -> Vec<f64> {
            let pair = points.split(' ').nth(i).unwrap();
            pair.split(',').map(|v| v.parse().unwrap()).collect()
        };
        assert!(place(1)[0] > place(0)[0]);
        assert!(place(1)[1] < place(0)[1]);
        assert!(svg.contains("a &lt; b &amp; &quot;c&quot;"));
    }

    #[test]
    fn odd_numbers_make_no_odd_svg() {
        for axis in [Axis::linear, Axis::logarithmic] {
            for points in [
                &[][..],
                &[(0.0, 0.0)],
                &[(f64::NAN, 1.0), (1.0, f64::INFINITY), (2.0, -3.0)],
                &[(1.0, 5.0), (2.0, 5.0)],
                &[(1e-30, 1e30), (1e30, 1e-30)],
            ] {
                let svg = plot(points, axis);
                assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
                assert!(svg.len() < 20_000);
            }
        }
    }

    #[test]
    fn bars_start_at_zero_and_gaps_stay_empty() {
        let interval = Some((0.1, 0.6));
        let value = Value {
            value: 0.5,
            interval,
        };
        let bars = Bars {
            title: "t".into(),
            y_label: "y".into(),
            groups: vec!["one".into(), "two".into()],
            series: vec![
                ("a".into(), vec![Some(value), None]),
                ("b".into(), vec![Some((-0.25).into())]),
            ],
        };
        let svg = bars.to_svg();
        // The background, two bars, two legend entries.
        assert_eq!(svg.matches("<rect").count(), 5);
    }

    #[test]
    fn ticks_are_round() {
        for (raw, step) in [(0.13, 0.2), (3.0, 5.0), (1.0, 1.0), (70.0, 100.0)] {
            assert!((round_step(raw) - step).abs() < 1e-9 * step);
        }
        assert_eq!(number(0.30000000000000004), "0.3");
        assert_eq!(number(-0.0), "0");
        assert_eq!(number(2e7), "2e7");
    }
}
