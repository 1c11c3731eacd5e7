//! Pictures of what a run has measured: events a second against one property of the backlog.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Error, anyhow, ensure};
use plotters::prelude::*;

use super::report::{Report, Row, Spread, number};

const SIZE: (u32, u32) = (720, 420);
const FIGURE: &str = "events/s";

/// Draws a picture for every axis with at least two places on it; returns where they are.
///
/// # Errors
/// When the run has failed, or has measured nothing that can be drawn.
pub fn draw(report: &Report, folder: &Path) -> Result<Vec<PathBuf>, Error> {
    ensure!(
        report.failed.is_empty(),
        "a run that has failed has no figures"
    );
    let axes: BTreeSet<&String> = report.rows.iter().flat_map(|row| row.axes.keys()).collect();
    std::fs::create_dir_all(folder)?;
    let mut drawn = Vec::new();
    for axis in axes {
        let points = points(&report.rows, axis);
        if points.len() > 1 {
            let file = folder.join(format!("drain-{}.svg", axis.replace(' ', "-")));
            picture(&file, axis, &points, &report.header.lines())
                .map_err(|error| anyhow!("draw {}: {error}", file.display()))?;
            drawn.push(file);
        }
    }
    ensure!(
        !drawn.is_empty(),
        "there is nothing to draw: run the case drain"
    );
    Ok(drawn)
}

/// Where on the axis, and what the relay and its limit did there.
struct Point {
    at: f64,
    relay: Spread,
    limit: Spread,
}

fn points(rows: &[Row], axis: &str) -> Vec<Point> {
    let mut points: Vec<Point> = rows
        .iter()
        .filter(|row| row.figure == FIGURE)
        .filter_map(|row| {
            Some(Point {
                at: *row.axes.get(axis)?,
                relay: row.relay(),
                limit: row.limits(),
            })
        })
        .collect();
    points.sort_by(|a, b| a.at.total_cmp(&b.at));
    points
}

type Of = fn(&Point) -> Spread;
type Drawn = Result<(), Box<dyn std::error::Error>>;

fn picture(file: &Path, axis: &str, points: &[Point], header: &[String]) -> Drawn {
    let area = SVGBackend::new(file, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let (body, foot) = area.split_vertically(SIZE.1 - 18 * u32::try_from(header.len())? - 6);
    let small = ("sans-serif", 11).into_font().color(&BLACK.mix(0.6));
    for (n, line) in (0..).zip(header) {
        foot.draw(&Text::new(line.clone(), (12, 18 * n), small.clone()))?;
    }
    let first = points.first().map_or(1.0, |point| point.at);
    let last = points.last().map_or(1.0, |point| point.at);
    let highest = points
        .iter()
        .map(|point| point.relay.high.max(point.limit.high))
        .fold(0.0, f64::max);
    // The axis names the places that were measured, and no others.
    let places: Vec<f64> = points.iter().map(|point| point.at).collect();
    let range = (first / 1.3..last * 1.3).log_scale();
    let mut chart = ChartBuilder::on(&body)
        .caption(format!("{FIGURE} against {axis}"), ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(64)
        .build_cartesian_2d(range.with_key_points(places), 0.0..highest * 1.1)?;
    chart
        .configure_mesh()
        .x_desc(axis)
        .x_label_formatter(&|at| number(*at))
        .y_label_formatter(&|rate| number(*rate))
        .light_line_style(TRANSPARENT)
        .draw()?;
    let series: [(&str, RGBColor, Of); 2] = [
        ("relay", RGBColor(0, 90, 181), |point| point.relay),
        ("bare loop", RGBColor(220, 50, 32), |point| point.limit),
    ];
    for (n, (name, colour, of)) in (0..).zip(series) {
        let medians = points.iter().map(|point| (point.at, of(point).median));
        chart.draw_series(LineSeries::new(medians, colour.stroke_width(2)).point_size(4))?;
        // From the lowest round to the highest.
        chart.draw_series(points.iter().map(|point| {
            let Spread { low, high, .. } = of(point);
            PathElement::new([(point.at, low), (point.at, high)], colour)
        }))?;
        // Above the chart: a box inside it would hide a line.
        let style = ("sans-serif", 15).into_font().color(&colour);
        body.draw(&Text::new(name, (76 + 56 * n, 14), style))?;
    }
    area.present()?;
    Ok(())
}
