//! The page a demo ends with: one self-contained HTML file, made of plain values.

use simpatico_engine::plot::MADE_HERE;
use std::fmt::Write;

/// All that the page shows.
#[derive(Default)]
pub struct Page {
    /// One line on what was run: sizes, seed, machine.
    pub run: String,
    /// Everyone, placed by embedding.
    pub community: Vec<Dot>,
    /// The names of the tastes that colour the dots.
    pub tastes: Vec<String>,
    /// The newcomers.
    pub users: Vec<UserCard>,
    /// One for each picture.
    pub grids: Vec<Grid>,
    /// What feedback changed.
    pub rounds: Vec<Round>,
    /// Stage, seconds, remark.
    pub timings: Vec<(String, f64, String)>,
    /// Likes seen, share of neighbours with the same taste, the same by chance.
    pub cold_start: Vec<(usize, f64, f64)>,
}

/// A user in the picture of the community.
pub struct Dot {
    /// Place, both in -1..1.
    pub x: f32,
    /// Place, both in -1..1.
    pub y: f32,
    /// Index into the page's tastes.
    pub taste: usize,
    /// Set for the newcomers.
    pub name: Option<String>,
}

/// A newcomer, in words.
pub struct UserCard {
    /// Who.
    pub name: String,
    /// What they said.
    pub likes: Vec<String>,
    /// What they said.
    pub dislikes: Vec<String>,
    /// Name, attributes in common, weight.
    pub neighbors: Vec<(String, u32, f64)>,
    /// What the neighbours add.
    pub would_add: Vec<String>,
}

/// One source picture and what it became for everyone.
pub struct Grid {
    /// What the source shows.
    pub caption: String,
    /// PNG bytes.
    pub before: Vec<u8>,
    /// PNG bytes of the control image.
    pub edges: Vec<u8>,
    /// One for each user.
    pub cells: Vec<Cell>,
}

/// One edited picture.
pub struct Cell {
    /// The sentence carried out.
    pub instruction: String,
    /// Which likes and neighbours led to it.
    pub why: String,
    /// Whether it was anyone's instruction.
    pub generic: bool,
    /// PNG bytes.
    pub after: Vec<u8>,
}

/// An answer to an edit, and the next edit.
pub struct Round {
    /// Whose.
    pub user: String,
    /// "accept" or "reject".
    pub verdict: String,
    /// What the feedback was turned into.
    pub learned: String,
    /// The edit that was answered.
    pub first: Cell,
    /// The edit afterwards.
    pub second: Cell,
}

const COLORS: [&str; 12] = [
    "#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f", "#edc948", "#b07aa1", "#ff9da7",
    "#9c755f", "#86bcb6", "#8cd17d", "#d37295",
];

/// The page as HTML, with every picture inside.
pub fn html(page: &Page) -> String {
    let mut out = String::with_capacity(1 << 20);
    let _ = write!(
        out,
        "<!doctype html><html lang=en><meta charset=utf-8>\
         <meta name=viewport content=\"width=device-width,initial-scale=1\">{MADE_HERE}\
         <title>Simpatico</title><style>{STYLE}</style><main>\
         <h1>Simpatico</h1><p class=lead>It learned these people's taste from a handful of likes, \
         asked who is like whom, and edited the same pictures for each of them.</p>\
         <p class=run>{}</p>",
        escape(&page.run)
    );
    users(&mut out, page);
    grids(&mut out, page);
    rounds(&mut out, page);
    community(&mut out, page);
    cold_start(&mut out, page);
    timings(&mut out, page);
    out.push_str("</main></html>\n");
    out
}

fn users(out: &mut String, page: &Page) {
    out.push_str(
        "<h2>Four newcomers, three likes each</h2><p>Each names three that the small picture \
         model can show: colours, materials, patterns and backgrounds.</p><div class=cards>",
    );
    for user in &page.users {
        let _ = write!(out, "<section class=card><h3>{}</h3>", escape(&user.name));
        chips(out, "likes", "like", &user.likes);
        chips(out, "dislikes", "dislike", &user.dislikes);
        chips(out, "their neighbours add", "added", &user.would_add);
        out.push_str("<p class=label>nearest neighbours</p><ul>");
        for (name, overlap, weight) in &user.neighbors {
            let _ = write!(
                out,
                "<li>{} <span class=dim>{overlap} in common, weight {weight:.2}</span></li>",
                escape(name)
            );
        }
        out.push_str("</ul></section>");
    }
    out.push_str("</div>");
}

fn chips(out: &mut String, label: &str, class: &str, words: &[String]) {
    if words.is_empty() {
        return;
    }
    let _ = write!(out, "<p class=label>{label}</p><p>");
    for word in words {
        let _ = write!(out, "<span class=\"chip {class}\">{}</span> ", escape(word));
    }
    out.push_str("</p>");
}

fn grids(out: &mut String, page: &Page) {
    out.push_str(
        "<h2>The same pictures, edited for each of them</h2>\
         <p>None of these pictures was in the training data. Rest the pointer on an edit to see \
         why it was made.</p><div class=scroll><table class=grid><tr><th>before<th>edges",
    );
    for user in &page.users {
        let _ = write!(out, "<th>{}", escape(&user.name));
    }
    for grid in &page.grids {
        let _ = write!(
            out,
            "<tr><td>{}<p>{}</p><td>{}",
            image(&grid.before, &grid.caption),
            escape(&grid.caption),
            image(&grid.edges, "edges")
        );
        for cell in &grid.cells {
            let _ = write!(out, "<td title=\"{}\">", escape(&cell.why));
            cell_inside(out, cell);
        }
    }
    out.push_str("</table></div>");
}

fn cell_inside(out: &mut String, cell: &Cell) {
    let mark = if cell.generic {
        " <span class=dim>(generic)</span>"
    } else {
        ""
    };
    let _ = write!(
        out,
        "{}<p>“{}”{mark}</p>",
        image(&cell.after, &cell.instruction),
        escape(&cell.instruction)
    );
}

fn rounds(out: &mut String, page: &Page) {
    if page.rounds.is_empty() {
        return;
    }
    out.push_str(
        "<h2>They answered, and the next edit followed</h2><div class=scroll><table class=grid>\
         <tr><th>user<th>first edit<th>answer<th>next edit",
    );
    for round in &page.rounds {
        let _ = write!(out, "<tr><td><b>{}</b><td>", escape(&round.user));
        cell_inside(out, &round.first);
        let _ = write!(
            out,
            "<td><span class=\"chip {}\">{}</span><p>{}</p><td>",
            if round.verdict == "accept" {
                "like"
            } else {
                "dislike"
            },
            escape(&round.verdict),
            escape(&round.learned)
        );
        cell_inside(out, &round.second);
    }
    out.push_str("</table></div>");
}

fn community(out: &mut String, page: &Page) {
    out.push_str(
        "<h2>The community, placed by embedding</h2><p>Every dot is a user; its colour is the \
         taste it was made with, which the store never saw.</p>\
         <svg viewBox=\"-1.08 -1.08 2.16 2.16\" class=map role=img aria-label=community>",
    );
    for dot in page.community.iter().filter(|d| d.name.is_none()) {
        let color = COLORS[dot.taste % COLORS.len()];
        let _ = write!(
            out,
            "<circle cx={:.3} cy={:.3} r=.009 fill=\"{color}\" opacity=.6></circle>",
            dot.x, dot.y
        );
    }
    for dot in &page.community {
        if let Some(name) = &dot.name {
            let _ = write!(
                out,
                "<circle cx={:.3} cy={:.3} r=.024 fill=none stroke=#111 stroke-width=.008></circle>\
                 <text x={:.3} y={:.3} font-size=.052 font-weight=700>{}</text>",
                dot.x,
                dot.y,
                dot.x + 0.035,
                dot.y + 0.017,
                escape(name)
            );
        }
    }
    out.push_str("</svg><p>");
    for (at, taste) in page.tastes.iter().enumerate() {
        let color = COLORS[at % COLORS.len()];
        let _ = write!(
            out,
            "<span class=chip style=\"background:{color}22;border-color:{color}\">{}</span> ",
            escape(taste)
        );
    }
    out.push_str("</p>");
}

fn cold_start(out: &mut String, page: &Page) {
    let Some(most) = page.cold_start.iter().map(|p| p.0).max().filter(|n| *n > 0) else {
        return;
    };
    out.push_str(
        "<h2>How many likes it takes</h2><p>Share of a newcomer's ten nearest neighbours who have \
         the same taste, after so many likes; dashed: by chance.</p>\
         <svg viewBox=\"0 0 640 260\" class=chart role=img aria-label=\"cold start\">",
    );
    let x = |n: usize| 50.0 + 560.0 * (n as f64 + 1.0).ln() / (most as f64 + 1.0).ln();
    let y = |v: f64| 220.0 - 200.0 * v;
    for tick in 0..=4 {
        let v = f64::from(tick) / 4.0;
        let _ = write!(
            out,
            "<line x1=50 x2=610 y1={0:.1} y2={0:.1} stroke=#ddd></line>\
             <text x=44 y={1:.1} text-anchor=end font-size=12>{v:.2}</text>",
            y(v),
            y(v) + 4.0
        );
    }
    let line = |value: fn(&(usize, f64, f64)) -> f64| -> String {
        let points: Vec<String> = page
            .cold_start
            .iter()
            .map(|p| format!("{:.1},{:.1}", x(p.0), y(value(p))))
            .collect();
        points.join(" ")
    };
    let _ = write!(
        out,
        "<polyline points=\"{}\" fill=none stroke=#4e79a7 stroke-width=2.5></polyline>\
         <polyline points=\"{}\" fill=none stroke=#999 stroke-dasharray=5></polyline>",
        line(|p| p.1),
        line(|p| p.2)
    );
    for (n, value, _) in &page.cold_start {
        let _ = write!(
            out,
            "<circle cx={0:.1} cy={1:.1} r=4 fill=#4e79a7></circle>\
             <text x={0:.1} y=240 text-anchor=middle font-size=12>{n}</text>",
            x(*n),
            y(*value)
        );
    }
    out.push_str("</svg>");
}

fn timings(out: &mut String, page: &Page) {
    out.push_str("<h2>What it took</h2><table class=times>");
    for (stage, seconds, remark) in &page.timings {
        let _ = write!(
            out,
            "<tr><td>{}<td class=num>{seconds:.2} s<td class=dim>{}",
            escape(stage),
            escape(remark)
        );
    }
    out.push_str("</table>");
}

fn image(png: &[u8], alt: &str) -> String {
    format!(
        "<img alt=\"{}\" src=\"data:image/png;base64,{}\">",
        escape(alt),
        base64(png)
    )
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let word = three
            .iter()
            .enumerate()
            .fold(0u32, |w, (i, b)| w | u32::from(*b) << (16 - 8 * i));
        for digit in 0..4 {
            let value = word >> (18 - 6 * digit) & 63;
            out.push(if digit <= three.len() {
                DIGITS[value as usize] as char
            } else {
                '='
            });
        }
    }
    out
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c => out.push(c),
        }
    }
    out
}

const STYLE: &str = "
:root{color-scheme:light}
body{font:16px/1.5 system-ui,sans-serif;margin:0;background:#faf9f7;color:#222}
main{max-width:1180px;margin:auto;padding:2rem 1.2rem}
h1{font-size:2.4rem;margin:.2em 0 0}h2{margin-top:2.4em}
.lead{font-size:1.15rem;max-width:46em;margin:.2em 0}.run,.dim{color:#777;font-size:.85rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(230px,1fr));gap:1rem}
.card{background:#fff;border:1px solid #e5e2dc;border-radius:12px;padding:1rem 1.1rem}
.card h3{margin:0 0 .3em}.card ul{margin:.2em 0;padding-left:1.1em}
.label{color:#777;font-size:.8rem;margin:.7em 0 .2em}.card p{margin:.2em 0}
.chip{display:inline-block;border:1px solid #ccc;border-radius:99px;padding:.05em .6em;margin:.1em 0;font-size:.85rem}
.like{background:#e6f4e6;border-color:#59a14f}.dislike{background:#fbe7e7;border-color:#e15759}
.added{background:#e8eff7;border-color:#4e79a7}
.scroll{overflow-x:auto}.grid{border-collapse:collapse}.grid td,.grid th{padding:.4rem;vertical-align:top;width:176px}
.grid img{width:168px;height:auto;image-rendering:auto;border-radius:8px;display:block;background:#eee}
.grid p{margin:.25em 0 0;font-size:.82rem;line-height:1.3}
.map{width:100%;max-width:760px;background:#fff;border-radius:12px;border:1px solid #e5e2dc}
.chart{width:100%;max-width:640px;background:#fff;border-radius:12px;border:1px solid #e5e2dc}
.times{border-collapse:collapse}.times td{padding:.25em 1em .25em 0;border-bottom:1px solid #eee}.num{text-align:right}
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_pads_as_the_standard_says() {
        let words = ["", "f", "fo", "foo", "foob", "fooba", "foobar"];
        let coded = [
            "", "Zg==", "Zm8=", "Zm9v", "Zm9vYg==", "Zm9vYmE=", "Zm9vYmFy",
        ];
        for (word, code) in words.into_iter().zip(coded) {
            assert_eq!(base64(word.as_bytes()), code);
        }
    }

    #[test]
    fn hostile_names_stay_text() {
        let page = Page {
            users: vec![UserCard {
                name: "<script>alert(1)</script>".into(),
                likes: vec!["\"><img src=x>".into()],
                dislikes: Vec::new(),
                neighbors: Vec::new(),
                would_add: Vec::new(),
            }],
            ..Page::default()
        };
        let page = html(&page);
        assert!(!page.contains("<script>") && !page.contains("<img src=x>"));
    }
}
