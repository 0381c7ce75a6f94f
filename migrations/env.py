"""Runs migrations on the connection that rococap passes, else on the database named by ROCOCAP_DB."""

from alembic import context

from rococap import db
from rococap.tables import metadata


def run(connection):
    context.configure(
        connection=connection,
        target_metadata=metadata,
        render_as_batch=True,
        # The whole migration is one transaction, opened and committed by rococap.db.
        transactional_ddl=False,
    )
    context.run_migrations()


if (given := context.config.attributes.get("connection")) is not None:
    run(given)
else:
    with db.migration_connection(db.connect(db.default_url(), create=False)) as connection:
        run(connection)
