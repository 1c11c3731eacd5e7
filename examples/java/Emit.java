// A service that emits, with JDBC.
//
//   java -cp postgresql.jar Emit.java
//
// DATABASE_URL: postgres://user:password@host:5432/database, of a role that is a member of outbox_writer.
// Prints the uuid of the event, by which consumers deduplicate.

import java.net.URI;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.SQLException;
import java.util.Properties;

class Emit {
    public static void main(String[] arguments) throws SQLException {
        try (Connection connection = connect(URI.create(System.getenv("DATABASE_URL")))) {
            run(connection, "create table if not exists shop_order (id text primary key, status text not null)");
            connection.setAutoCommit(false);
            System.out.println(place(connection, "1001", "49.90"));
            cancel(connection, "1001");
            delete(connection, "1000");
        }
    }

    /** The change and its event, in one transaction: either both are there, or neither. */
    static String place(Connection connection, String order, String total) throws SQLException {
        // First the row: its lock puts the events of one order into the order of their commits.
        run(connection, """
            insert into shop_order (id, status) values (?, 'placed')
            on conflict (id) do update set status = excluded.status""", order);
        // Headers for every event of this transaction. They end with it.
        run(connection, "select outbox.context(?::json)", """
            {"tenant": "acme", "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}""");
        String payload = "{\"order_id\": \"%s\", \"total\": \"%s\"}".formatted(order, total);
        String id = emit(connection, order, "order.placed", payload, "{\"channel\": \"java\"}");
        connection.commit();
        return id;
    }

    /** Rolled back: neither the change nor the event has happened. */
    static void cancel(Connection connection, String order) throws SQLException {
        run(connection, "update shop_order set status = 'cancelled' where id = ?", order);
        emit(connection, order, "order.cancelled", "{\"order_id\": \"%s\"}".formatted(order), null);
        connection.rollback();
    }

    /** No payload: a tombstone, which deletes the key from a compacted topic. */
    static void delete(Connection connection, String order) throws SQLException {
        run(connection, "delete from shop_order where id = ?", order);
        emit(connection, order, "order.deleted", null, null);
        connection.commit();
    }

    /** Topic, key, type, payload, and headers of this event alone. */
    static String emit(Connection connection, String order, String type, String payload, String headers)
            throws SQLException {
        return run(connection, "select outbox.emit('order', ?, ?, ?::json, ?::json)", order, type, payload, headers);
    }

    /** Runs a statement; returns the first column of its first row, if there is one. */
    static String run(Connection connection, String sql, String... values) throws SQLException {
        try (var statement = connection.prepareStatement(sql)) {
            for (int i = 0; i < values.length; i++) {
                statement.setString(i + 1, values[i]);
            }
            if (!statement.execute()) {
                return null;
            }
            var rows = statement.getResultSet();
            return rows.next() ? rows.getString(1) : null;
        }
    }

    /** JDBC wants user and password beside the URL. */
    static Connection connect(URI url) throws SQLException {
        var properties = new Properties();
        if (url.getUserInfo() != null) {
            String[] user = url.getUserInfo().split(":", 2);
            properties.setProperty("user", user[0]);
            properties.setProperty("password", user.length > 1 ? user[1] : "");
        }
        String options = url.getRawQuery() == null ? "" : "?" + url.getRawQuery();
        int port = url.getPort() < 0 ? 5432 : url.getPort();
        String address = "jdbc:postgresql://%s:%d%s%s".formatted(url.getHost(), port, url.getPath(), options);
        return DriverManager.getConnection(address, properties);
    }
}
