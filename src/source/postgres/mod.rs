//! Captures from PostgreSQL by snapshot windows. (*source* → order → route → encode → sink)
//!
//! Keeps no transaction, snapshot or cursor open between statements, uses no session feature in poll mode (so it works
//! through a transaction-mode pooler), and never writes; behind a backlog it ends an empty transaction to raise its floor.

pub(crate) mod ask;
mod connector;
mod hint;
mod history;
mod late;
mod listener;
mod pace;
mod page;
mod resets;
#[doc(hidden)]
pub mod row;
mod shard;
mod statement;
mod unseen;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Executor, Row as _};
use tokio::time::{Instant, timeout};

pub use self::connector::Connector;
pub use self::hint::CaptureMode;
use self::hint::Hints;
pub(crate) use self::history::History;
use self::late::Late;
use self::page::{Read, SILENCE_MAX, code, contradicts, fetch, is_of_a_row, silent, skeleton};
use self::resets::{Answer, Resets, Verdict};
use self::row::Fields;
use self::shard::Share;
pub(crate) use self::statement::NEWEST_ID;
use self::statement::{Belief, NAME_BYTES_MAX, Pick, Tried};
use super::{Page, PageLimits, Source, SourceError};
use crate::event::{EventId, PipelineName, Shard};
use crate::position::{Position, Snapshot, Window};

/// A page starts this small and doubles while its bytes allow, so that the first page of huge events is not thousands.
const FIRST_PAGE_ROWS: usize = 500;

/// A statement looks at this many ids at least, and at twice the rows that it may return: what a wrong plan sorts.
const IDS_MIN: i64 = 2_000;

/// Where there are no rows for this window it looks further and further, up to this many ids in one statement.
const IDS_MAX: i64 = 1_000_000;

/// An idle log is read this often all the same: what is wrong with the table is to show before an event is there.
const READ_INTERVAL: Duration = Duration::from_secs(5);

/// When the floor of the next window would lie this far below the newest id, it is raised before the window opens.
const FLOOR_LAG_MAX: i64 = 100_000;

/// How the source reaches the database.
#[derive(Clone)]
pub struct Settings {
    /// For reading; may go through a transaction-mode pooler.
    pub connector: Connector,
    /// For LISTEN, which needs a connection of its own that no pooler shares.
    pub direct_connector: Connector,
    /// How it learns of new events.
    pub mode: CaptureMode,
    /// The longest time without looking at an idle log in poll mode.
    pub poll_interval: Duration,
}

impl fmt::Debug for Settings {
    // The options hold the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("mode", &self.mode)
            .field("poll_interval", &self.poll_interval)
            .finish_non_exhaustive()
    }
}

/// Reads the outbox of one database for one pipeline.
pub struct PostgresSource {
    connector: Connector,
    connection: Option<PgConnection>,
    hints: Hints,
    at: Position,
    /// The highest ceiling that had been read before a cursor write of ours that has completed: with that write's
    /// transaction ended, a snapshot taken now has an xmax above it, and whoever is at or above that xmax took their
    /// ids after the ceiling was read.
    safe_floor: EventId,
    page_rows: usize,
    /// How often in a row a stretch of the window had no rows.
    empty_stretches: u32,
    /// Whether the window has had no rows so far.
    barren: bool,
    /// Which events are its own.
    share: Share,
    late: Late,
    /// The late events of the window lie above this id.
    late_from: EventId,
    /// When the table was last read in this life.
    read_at: Option<Instant>,
    resets: Resets,
    /// Writes nothing, not even what makes reading cheaper.
    looks_on: bool,
}

impl PostgresSource {
    /// A source that connects when it is first used.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        let Settings {
            connector,
            direct_connector,
            mode,
            poll_interval,
        } = settings;
        Self {
            connector,
            connection: None,
            hints: Hints::new(mode, direct_connector, poll_interval),
            at: Position::beginning(),
            safe_floor: EventId(0),
            page_rows: FIRST_PAGE_ROWS,
            empty_stretches: 0,
            barren: false,
            share: Share::everything(),
            late: Late::default(),
            late_from: EventId(0),
            read_at: None,
            resets: Resets::since(&Position::beginning()),
            looks_on: false,
        }
    }

    /// Takes no transaction id and repairs no sequence: for who only looks on. Where ids began anew it says so and ends.
    #[must_use]
    pub fn looking_on(mut self) -> Self {
        self.looks_on = true;
        self
    }

    /// Reads only the events of one shard of a pipeline.
    #[must_use]
    pub fn of_shard(mut self, pipeline: PipelineName, shard: Shard) -> Self {
        self.share = Share::new(pipeline, shard);
        self
    }

    /// The statement that reads the next page of the window; for the tests of its plan.
    #[doc(hidden)]
    #[must_use]
    pub fn statement(&self, limits: PageLimits) -> String {
        let condition = self.share.condition(&self.at.window.prev);
        statement::page(self.pick(limits, &condition))
    }

    fn pick<'a>(&'a self, limits: PageLimits, condition: &'a str) -> Pick<'a> {
        Pick {
            at: &self.at,
            late_from: self.late_from,
            condition,
            rows_max: self.rows_max(limits),
            ids_max: self.ids_max(limits),
        }
    }

    fn rows_max(&self, limits: PageLimits) -> usize {
        self.page_rows.min(limits.rows).max(1)
    }

    fn ids_max(&self, limits: PageLimits) -> i64 {
        let enough = i64::try_from(self.rows_max(limits)).map_or(IDS_MAX, |rows| rows * 2);
        let base = enough.clamp(IDS_MIN, IDS_MAX);
        (base << self.empty_stretches.min(16)).min(IDS_MAX)
    }

    /// Reads one stretch of the log: a page of it, or nothing, which is not the end unless the page says so.
    async fn read(&mut self, limits: PageLimits) -> Result<Page, anyhow::Error> {
        let opens = self.at.at_end_of_window();
        if opens {
            self.open().await?;
            let window = &self.at.window;
            let (floor, ceiling) = (window.floor, window.ceiling);
            // Where any transaction has ended, the page is read all the same: ids may have begun anew and come as far as
            // they were.
            let nothing = ceiling == floor
                && window.prev.xmax == window.cur.xmax
                && window.ended().next().is_none();
            let recently = |at: Instant| at.elapsed() < READ_INTERVAL;
            if nothing && self.read_at.is_some_and(recently) {
                self.at.last_id = ceiling;
                return Ok(Page {
                    events: Vec::new(),
                    end: self.at.clone(),
                    more: false,
                });
            }
        }
        let (read, rows_max, ids_max) = self.fetch_readable(limits).await?;
        if read.contradicted {
            let window = self.at.window.clone();
            let found = Answer {
                newest: window.ceiling,
                mark: None,
                contradicted: true,
                newest_row: None,
            };
            let window = self.begin_anew(window.prev.clone(), &found).await?;
            self.enter(window);
            return Ok(Page {
                events: Vec::new(),
                end: self.at.clone(),
                more: true,
            });
        }
        // Everything after relies on the order: better no page than a wrong one.
        ensure!(
            read.events.is_sorted_by(|a, b| a.id < b.id),
            "the page is out of order: {} events from id {} on",
            read.events.len(),
            read.events[0].id
        );
        let full = !read.complete || read.events.len() >= rows_max;
        self.adapt_page_rows(read.events.len(), read.bytes, limits, full);
        let Window { floor, ceiling, .. } = *self.at.window;
        let after = self.at.last_id.max(floor);
        self.at.last_id = match read.events.last() {
            Some(event) if full => event.id,
            _ => EventId(after.0.saturating_add(ids_max)).min(ceiling),
        };
        self.barren &= read.events.is_empty();
        self.empty_stretches = if read.events.is_empty() && after < ceiling {
            self.empty_stretches.saturating_add(1)
        } else {
            0
        };
        // An older window does not know what came after it.
        let more = !opens || !self.at.at_end_of_window();
        Ok(Page {
            events: read.events,
            end: self.at.clone(),
            more,
        })
    }

    /// How often ids began anew since the last [`seek`](Source::seek); for the tests.
    #[doc(hidden)]
    #[must_use]
    pub fn resets(&self) -> u64 {
        self.resets.count()
    }

    /// Opens the window that follows the one that is done with; for the tests of its plans.
    #[doc(hidden)]
    pub async fn open(&mut self) -> Result<(), anyhow::Error> {
        let mut window = self.next_window().await?;
        // After a window without rows no cursor moves soon, and the same ids would be looked at again and again.
        let lag_max = if self.barren { IDS_MIN } else { FLOOR_LAG_MAX };
        let lags = window.ceiling.0 - window.next_floor.0 > lag_max;
        if lags && !self.looks_on && !self.resets.looks_at_all(&window) {
            // The window after this one would look at all the rows of this one again.
            self.raise_floor(window.ceiling).await?;
            window = self.next_window().await?;
        }
        self.enter(window);
        Ok(())
    }

    fn enter(&mut self, window: Window) {
        self.empty_stretches = 0;
        self.barren = true;
        self.late_from = self.late.from(window.ended());
        self.late.learn(&window);
        self.at = Position {
            window: Arc::new(window),
            last_id: EventId(0),
        };
    }

    /// The window that begins where the one before ends; of all ids where they began anew.
    async fn next_window(&mut self) -> Result<Window, anyhow::Error> {
        let before = self.at.window.clone();
        let now = Instant::now();
        let mut tried = self.resets.due(now);
        let mut belief = match tried {
            Tried::Rows => self.resets.tried().clone(),
            Tried::Sequence | Tried::No => self.resets.same().clone(),
        };
        let (mut cur, mut answer) = self.ask_for_window(&belief, tried).await?;
        let mut verdict = self.resets.judge(tried, &answer, before.ceiling);
        if verdict == Verdict::Doubtful {
            tried = Tried::Rows;
            belief = self.resets.same().clone();
            (cur, answer) = self.ask_for_window(&belief, tried).await?;
            verdict = self.resets.judge(tried, &answer, before.ceiling);
        }
        if verdict == Verdict::Reset {
            // Windows that were opened since the belief was known to hold may have missed rows.
            let missed = answer.shows_rows();
            let prev = if missed {
                &belief.snapshot
            } else {
                &before.cur
            };
            return self.begin_anew(prev.clone(), &answer).await;
        }
        let window = Window {
            prev: before.cur.clone(),
            cur,
            floor: before.next_floor,
            ceiling: answer.newest.max(before.next_floor),
            next_floor: self.safe_floor.max(before.next_floor),
        };
        self.resets.opened(tried, &window, &self.late, now);
        Ok(window)
    }

    /// Ids began anew. The sequence is set above all that were ever handed out, so that none comes a second time, and
    /// the next window looks at all ids for what its snapshots say is new.
    async fn begin_anew(
        &mut self,
        prev: Snapshot,
        found: &Answer,
    ) -> Result<Window, anyhow::Error> {
        ensure!(
            !self.looks_on,
            "the ids of outbox.events began anew (the newest one handed out is {}, and the log has been at {}): a relay that runs \
             sets the sequence above them, or run `select outbox.repair_sequence()`",
            found.newest,
            self.at
                .window
                .ceiling
                .max(found.newest_row.unwrap_or_default())
        );
        let before = self.at.window.clone();
        let mut connection = self.connected().await?;
        let repair = connection.fetch_one(sqlx::raw_sql(
            "begin isolation level read committed; set local search_path to pg_catalog, pg_temp; \
             select outbox.repair_sequence(); commit",
        ));
        let row = timeout(SILENCE_MAX, repair)
            .await
            .map_err(|_| silent())?
            .context("set the sequence of the outbox above the ids that it had handed out")?;
        self.connection = Some(connection);
        let repaired: i64 = row.try_get(0).context("decode the newest id")?;
        tracing::error!(
            newest = found.newest.0,
            seen = before.ceiling.max(found.newest_row.unwrap_or_default()).0,
            "the ids of outbox.events began anew (the sequence was reset, set back, or not brought along with the rows): \
             the relay looks at the whole log once and publishes what is new, some of it perhaps again; ids continue above \
             {repaired}"
        );
        // The window after this one begins above all that this one looks at.
        self.safe_floor = EventId(0);
        self.raise_floor(EventId(repaired)).await?;
        let belief = self.resets.tried().clone();
        let (cur, answer) = self.ask_for_window(&belief, Tried::No).await?;
        let window = Window {
            prev,
            cur,
            floor: EventId(0),
            ceiling: answer.newest,
            next_floor: self.safe_floor,
        };
        self.late = Late::default();
        self.resets.began_anew(&window);
        Ok(window)
    }

    async fn ask_for_window(
        &mut self,
        belief: &Belief,
        tried: Tried,
    ) -> Result<(Snapshot, Answer), anyhow::Error> {
        let mut connection = self.connected().await?;
        let asked = sqlx::raw_sql(AssertSqlSafe(statement::head(belief, tried)));
        let row = timeout(SILENCE_MAX, connection.fetch_one(asked))
            .await
            .map_err(|_| silent())?
            .context("read the outbox")?;
        self.connection = Some(connection);
        let newest: i64 = row.try_get(0).context("decode the newest id")?;
        let cur: &str = row.try_get(1).context("decode the snapshot")?;
        let newest_row: Option<i64> = row.try_get(4).context("decode the newest row")?;
        let answer = Answer {
            newest: EventId(newest),
            mark: row.try_get(2).context("decode what the sequence is")?,
            contradicted: row.try_get(3).context("decode whether ids began anew")?,
            newest_row: newest_row.map(EventId),
        };
        Ok((cur.parse().context("decode the snapshot")?, answer))
    }

    /// A page without what can't be read; where its first row can't, that row alone. With the bounds that it had.
    async fn fetch_readable(
        &mut self,
        limits: PageLimits,
    ) -> Result<(Read, usize, i64), anyhow::Error> {
        loop {
            let (rows_max, ids_max) = (self.rows_max(limits), self.ids_max(limits));
            match self.fetch(limits).await {
                Ok(read) => return Ok((read, rows_max, ids_max)),
                // One of the rows can't be sent: it is among fewer and fewer, and then it is known.
                Err(error) if is_of_a_row(&error) && rows_max > 1 => {
                    self.page_rows = rows_max / 2;
                }
                Err(error) if is_of_a_row(&error) => {
                    let read = self.fetch_skeleton(limits, &error).await?;
                    return Ok((read, rows_max, ids_max));
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn fetch(&mut self, limits: PageLimits) -> Result<Read, anyhow::Error> {
        let mut connection = self.connected().await?;
        let statement = self.statement(limits);
        let (window, late_from) = (self.at.window.clone(), self.late_from);
        let contradicts =
            move |id, fields: &Fields<'_>| contradicts(&window, late_from, id, fields);
        let read = fetch(&mut connection, &statement, limits.bytes, contradicts).await?;
        self.read_at = Some(Instant::now());
        if read.complete {
            self.connection = Some(connection);
        } else {
            // The rest of the answer is on its way and not wanted; reading it would cost its whole size.
            drop(connection);
        }
        if let Some(id) = read.long_names
            && read.events.is_empty()
        {
            let why = anyhow!("event {id} has a name of more than {NAME_BYTES_MAX} bytes");
            return self.fetch_skeleton(limits, &why).await;
        }
        Ok(read)
    }

    /// The first row of the page, which can't be read, as an event that says why.
    async fn fetch_skeleton(
        &mut self,
        limits: PageLimits,
        why: &anyhow::Error,
    ) -> Result<Read, anyhow::Error> {
        let mut connection = self.connected().await?;
        let condition = self.share.condition(&self.at.window.prev);
        let statement = statement::skeleton(self.pick(limits, &condition));
        let asked = connection.fetch_optional(sqlx::raw_sql(AssertSqlSafe(statement)));
        let row = timeout(SILENCE_MAX, asked)
            .await
            .map_err(|_| silent())?
            .context("read what an event is called")?;
        self.connection = Some(connection);
        let row =
            row.with_context(|| format!("the row is gone that could not be read: {why:#}"))?;
        let event = skeleton(&row, why);
        Ok(Read {
            complete: false,
            bytes: event.size_bytes(),
            long_names: None,
            contradicted: false,
            events: vec![event],
        })
    }

    async fn connected(&mut self) -> Result<PgConnection, anyhow::Error> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.connector.connect().await?,
        };
        if !self.share.is_known() {
            timeout(SILENCE_MAX, self.share.learn(&mut connection))
                .await
                .map_err(|_| silent())??;
        }
        Ok(connection)
    }

    /// Ends a transaction that has an id, which is what makes a ceiling that was read before a floor for snapshots that
    /// are taken after. Otherwise the cursor's write does.
    async fn raise_floor(&mut self, ceiling: EventId) -> Result<(), anyhow::Error> {
        let mut connection = self.connected().await?;
        timeout(
            SILENCE_MAX,
            connection.execute(sqlx::raw_sql(
                "begin isolation level read committed; select pg_catalog.pg_current_xact_id(); commit",
            )),
        )
        .await
        .map_err(|_| silent())?
        .context("take a transaction id")?;
        self.connection = Some(connection);
        self.safe_floor = self.safe_floor.max(ceiling);
        Ok(())
    }

    /// Grows while pages stay well under the byte limit, shrinks to what would have fitted when they don't.
    fn adapt_page_rows(&mut self, rows: usize, bytes: usize, limits: PageLimits, full: bool) {
        if full && rows > 0 {
            let fitting = (limits.bytes / 2) / (bytes / rows).max(1);
            self.page_rows = fitting.clamp(1, self.page_rows * 2).min(limits.rows);
        }
    }
}

impl Source for PostgresSource {
    fn seek(&mut self, position: Position) {
        // A position may be one that somebody chose, whose window is none that was opened.
        self.late = Late::default();
        self.late_from = EventId(0);
        self.at = position;
        // The position may be that of a database that was restored, where the ids that were seen are still to come.
        self.safe_floor = EventId(0);
        self.page_rows = FIRST_PAGE_ROWS;
        self.empty_stretches = 0;
        self.barren = false;
        self.share.forget();
        self.read_at = None;
        self.resets = Resets::since(&self.at);
        self.hints.sought();
    }

    async fn capture(
        &mut self,
        limits: PageLimits,
        acknowledged: &Position,
    ) -> Result<Page, SourceError> {
        if self.resets.covers(acknowledged) {
            self.safe_floor = self.safe_floor.max(acknowledged.window.ceiling);
        }
        loop {
            let page = self.read(limits).await.map_err(classify)?;
            if !page.events.is_empty() || !page.more {
                let found = page.events.iter().map(|event| event.id);
                self.hints.looked(page.end.window.ceiling, found);
                return Ok(page);
            }
        }
    }

    async fn wake(&mut self) {
        self.hints.wait().await;
    }

    fn rest(&mut self) {
        self.hints.rest();
    }
}

/// A server's refusal of the statement (missing table, missing right, wrong type) is for a person; the rest for time.
pub(crate) fn classify(error: anyhow::Error) -> SourceError {
    match code(&error).as_deref().and_then(|code| code.get(..2)) {
        // Syntax or access (42), invalid authorization (28), no such database or schema (3D, 3F), wrong values (22).
        Some("42" | "28" | "3D" | "3F" | "22") => SourceError::Misconfigured(error),
        _ => SourceError::Transient(error),
    }
}
