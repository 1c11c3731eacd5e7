//! Logs with books beside them.

use outbox_relay::ledger::acts::{
    self, Marked, NotedAct, ParkedDetail, ParkedEvents, Selector, Wish,
};
use outbox_relay::ledger::postgres::PostgresLedger;
use outbox_relay::ledger::sqlite::SqliteLedger;
use outbox_relay::ledger::{Ledger, Settings};

use super::log::{Log, PolledPostgres, SqliteLog};

/// A log with books beside it.
pub trait Books: Log {
    type Ledger: Ledger + 'static;

    fn ledger(&self, settings: Settings) -> Self::Ledger;

    /// The parked events of the pipeline in the order of their ids: payload, encoded payload, headers and error.
    async fn parked(&mut self) -> Vec<ParkedRow>;

    /// Deletes the cursors, so that every pipeline begins anew.
    async fn forget_cursors(&mut self);

    /// What an operator asks for.
    async fn mark(&mut self, wish: &Wish) -> Vec<Marked>;

    /// What an operator sees, with a hundred bytes of each payload.
    async fn show(&mut self, selector: &Selector) -> Vec<ParkedDetail>;

    async fn list(&mut self, selector: &Selector) -> ParkedEvents;

    async fn acts(&mut self) -> Vec<NotedAct>;
}

pub type ParkedRow = (
    i64,
    Option<String>,
    Option<Vec<u8>>,
    Option<String>,
    Option<String>,
);

impl Books for SqliteLog {
    type Ledger = SqliteLedger;

    fn ledger(&self, settings: Settings) -> SqliteLedger {
        SqliteLedger::new(self.file.options.clone(), settings)
    }

    async fn parked(&mut self) -> Vec<ParkedRow> {
        let mut connection = self.file.connect().await;
        sqlx::query_as(
            "select id, payload, payload_bytes, headers, error from outbox_parked order by id",
        )
        .fetch_all(&mut connection)
        .await
        .unwrap()
    }

    async fn forget_cursors(&mut self) {
        let mut connection = self.file.connect().await;
        let deleted = sqlx::query("delete from outbox_cursors").execute(&mut connection);
        deleted.await.unwrap();
    }

    async fn mark(&mut self, wish: &Wish) -> Vec<Marked> {
        let mut connection = self.file.connect().await;
        acts::sqlite::mark(&mut connection, wish).await.unwrap()
    }

    async fn show(&mut self, selector: &Selector) -> Vec<ParkedDetail> {
        let mut connection = self.file.connect().await;
        acts::sqlite::show(&mut connection, selector, 100)
            .await
            .unwrap()
    }

    async fn list(&mut self, selector: &Selector) -> ParkedEvents {
        let mut connection = self.file.connect().await;
        acts::sqlite::list(&mut connection, selector, &acts::Paging::first(100))
            .await
            .unwrap()
    }

    async fn acts(&mut self) -> Vec<NotedAct> {
        let mut connection = self.file.connect().await;
        acts::sqlite::acts(&mut connection, 100, None)
            .await
            .unwrap()
    }
}

impl Books for PolledPostgres {
    type Ledger = PostgresLedger;

    fn ledger(&self, settings: Settings) -> PostgresLedger {
        PostgresLedger::new(self.database.options.clone(), settings)
    }

    async fn parked(&mut self) -> Vec<ParkedRow> {
        sqlx::query_as(
            "select id, payload::text, payload_bytes, headers::text, error from outbox.parked order by id",
        )
        .fetch_all(&self.database.pool)
        .await
        .unwrap()
    }

    async fn forget_cursors(&mut self) {
        let deleted = sqlx::query("delete from outbox.cursors").execute(&self.database.pool);
        deleted.await.unwrap();
    }

    async fn mark(&mut self, wish: &Wish) -> Vec<Marked> {
        let mut connection = self.database.connect().await;
        acts::postgres::mark(&mut connection, wish).await.unwrap()
    }

    async fn show(&mut self, selector: &Selector) -> Vec<ParkedDetail> {
        let mut connection = self.database.connect().await;
        acts::postgres::show(&mut connection, selector, 100)
            .await
            .unwrap()
    }

    async fn list(&mut self, selector: &Selector) -> ParkedEvents {
        let mut connection = self.database.connect().await;
        acts::postgres::list(&mut connection, selector, &acts::Paging::first(100))
            .await
            .unwrap()
    }

    async fn acts(&mut self) -> Vec<NotedAct> {
        let mut connection = self.database.connect().await;
        acts::postgres::acts(&mut connection, 100, None)
            .await
            .unwrap()
    }
}
